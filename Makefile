# `make demo` and `make test` are all there is to do: each first installs what is missing.
#
#   make PYTHON=/opt/python3.12/bin/python3 test    with another interpreter (3.10 to 3.13)
#   make test PYTEST_ARGS="-k packing -x"           with arguments for pytest
#   make test CONSTRAINTS=constraints-oldest.txt VENV=.venv-oldest    with the oldest packages that are supported
#
# pip's own settings hold. The index's torch for Linux x86_64 carries CUDA (3 GB) and runs without a GPU too;
# where that is too much, PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL can point at a CPU build of the same version.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help demo pipeline quick test test-all test-faults cluster-packages bench check format install clean

SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do \
	"$$p" -c '$(SUPPORTED)' 2> /dev/null && echo "$$p" && break; done)
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
GPUS = $(shell nvidia-smi -L > /dev/null 2>&1 && echo yes)
# The `deepspeed` launcher and ninja are found on PATH.
WITH_VENV = export PATH="$(BIN):$$PATH"

# install_system PACKAGE…: with apt-get, or says who has to.
define INSTALL_SYSTEM
install_system() {
	if [ $$# = 0 ]; then return; fi
	if [ "$$(id -u)" = 0 ]; then as_root=(env); else as_root=(sudo -n); fi
	if ! command -v apt-get > /dev/null || ! "$${as_root[@]}" true 2> /dev/null; then
		echo "make: these system packages are missing, and installing them needs root. Please run" >&2
		echo "    sudo apt-get update && sudo apt-get install -y $$*" >&2
		echo "(or what provides them on your system), then the same make command again." >&2
		exit 1
	fi
	echo "installing system packages: $$*"
	"$${as_root[@]}" apt-get update -qq
	"$${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends "$$@" > /dev/null
}
endef

help:
	@echo "make demo     install, then train a small model on text-to-SQL and show what changed"
	echo "make pipeline    install, then four stages one after another: text, SFT, a reward model, DPO"
	echo "make quick    install, then run the tests that start no run: a minute or so"
	echo "make test     install, then run what a change must pass, with one real run for each promise: 12 minutes"
	echo "make test-all install, then run every test with KILLS=60 (PART=i/4: a quarter, 10 to 45 minutes)"
	echo "make test-faults KILLS=60    install, then kill as many runs, most inside a save, and count what was lost"
	echo "make cluster-packages    install SLURM, ssh and the like from Debian: tests/cluster skips without them"
	echo "make bench    install, then dsdpo beside TRL's DPOTrainer: hours (BENCH_ARGS=\"--cases 'hh-lora-*'\" for a part)"
	echo "make golden   install, then ten short runs on a commit (BASE=HEAD) and on the tree: are the numbers the same?"
	echo "make check    ruff, ruff format --check, mypy"
	echo "make format   ruff's fixes and format"
	echo "make install  only install, into VENV (.venv)"
	echo "make clean    remove VENV and caches; runs and models stay"

demo: $(STAMP)
	@$(WITH_VENV)
	python demo/run.py

pipeline: $(STAMP)
	@$(WITH_VENV)
	python demo/pipeline.py

# One thread per process, since tests start several ranks; nothing is fetched from a hub. Tests run in three streams
# (tests/conftest.py; PYTEST_ARGS="-n 0" for a debugger), beside which kernels compile on half of the cores.
define TEST_ENVIRONMENT
$(WITH_VENV)
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
export MAX_JOBS=$${MAX_JOBS:-$$((($$(nproc) + 1) / 2))}
if [ -z "$(GPUS)" ]; then export DS_ACCELERATOR=cpu; fi
endef
QUICK := tests/unit tests/parity/test_trl_losses.py

quick: $(STAMP)
	@$(TEST_ENVIRONMENT)
	python -m pytest -n 2 -m "not slow and not start" $(PYTEST_ARGS) $(QUICK)

test: $(STAMP)
	@$(TEST_ENVIRONMENT)
	python -m pytest -n 3 -m "not slow" $(PYTEST_ARGS)

test-all: $(STAMP)
	@$(TEST_ENVIRONMENT)
	export KILLS=$(or $(KILLS),60)
	python -m pytest -n 3 --part $(or $(PART),1/1) $(PYTEST_ARGS)

test-faults: $(STAMP)
	@$(TEST_ENVIRONMENT)
	export KILLS=$(or $(KILLS),12)
	python -m pytest tests/faults/test_kills.py $(PYTEST_ARGS)

# Ten short runs with the code of BASE and of the tree, compared: make golden BASE=COMMIT GOLDEN_ARGS=--tolerance
.PHONY: golden
golden: $(STAMP)
	@$(WITH_VENV)
	python -m tests.golden.compare --base $(or $(BASE),HEAD) $(GOLDEN_ARGS)

# For tests/cluster: the real SLURM and ssh, and what DeepSpeed uses to bind ranks to cores and to read NVMe.
cluster-packages:
	@$(INSTALL_SYSTEM)
	export PATH="$$PATH:/usr/sbin:/sbin"
	missing=()
	for need in slurmctld:slurm-wlm munged:munge pdsh:pdsh sshd:openssh-server numactl:numactl ip:iproute2; do
		command -v "$${need%:*}" > /dev/null || missing+=("$${need#*:}")
	done
	[ -e /usr/include/libaio.h ] || missing+=(libaio-dev)
	install_system "$${missing[@]}"

# Wants a quiet machine: whatever else runs is in the numbers.
bench: $(STAMP)
	@$(WITH_VENV)
	if [ -n "$(GPUS)" ]; then python bench/cuda_7b.py $(BENCH_ARGS); else python bench/against_trl.py $(BENCH_ARGS); fi

check: $(STAMP)
	@$(WITH_VENV)
	ruff check .
	ruff format --check .
	mypy

format: $(STAMP)
	@$(WITH_VENV)
	ruff check --fix .
	ruff format .

install: $(STAMP)

clean:
	@rm -rf $(VENV) build dsdpo.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that nothing else chooses its version. c++ and the Python headers are for the
# kernels that DeepSpeed and Triton compile at run time (without them DeepSpeed cannot start on a CPU).
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(INSTALL_SYSTEM)
	start=$$(date +%s)
	python="$(PYTHON)"
	if ! "$${python:-false}" -c '$(SUPPORTED)'; then
		echo "make: Python 3.10 to 3.13 is needed; found '$$python'. Name one: make PYTHON=/path/to/python3.11" >&2
		exit 1
	fi
	version=$$("$$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
	header=$$("$$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
	missing=()
	"$$python" -c 'import ensurepip, venv' 2> /dev/null || missing+=("$$version-venv")
	[ -e "$$header" ] || missing+=("$$version-dev")
	command -v "$${CXX:-c++}" > /dev/null || missing+=(g++)
	install_system "$${missing[@]}"
	torch=$$(grep '^torch==' $(CONSTRAINTS))
	if ! $(BIN)/python -m pip --version > /dev/null 2>&1; then "$$python" -m venv --clear $(VENV); fi
	echo "installing $$torch, then the rest, into $(VENV)"
	$(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS) "$$torch"
	$(BIN)/python -m pip install --disable-pip-version-check -q --use-pep517 -c $(CONSTRAINTS) -e '.[dev]'
	if [ -n "$(GPUS)" ] && ! $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
		echo "make: there are NVIDIA GPUs, but torch cannot use them: see the driver's version in nvidia-smi, and" >&2
		echo "pip's settings for where torch came from. To go on without them: touch $(STAMP)" >&2
		exit 1
	fi
	if [ -z "$(GPUS)" ]; then
		echo "compiling DeepSpeed's CPU kernel, which would otherwise happen in the first run"
		export PATH="$(BIN):$$PATH" DS_ACCELERATOR=cpu
		python -c 'from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as Op; Op().load(verbose=False)' > /dev/null
	fi
	touch $@
	echo "set-up took $$(($$(date +%s) - start)) s"
