"""What is said of nodes that are not alike."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

import dsdpo
from dsdpo.config.load import load
from dsdpo.config.zero import ZeroConfig
from dsdpo.errors import ConfigError, IOFailure, Problem
from dsdpo.launch.node_info import NodesDiffer, differences, facts, missing, problems_of, remarks, summary
from dsdpo.runtime.env import Mesh


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text("{}")
    (folder / "zero.json").write_text("{}")
    options = f"model_name_or_path: {folder}\ndataset: d\noutput_dir: o\ndeepspeed: {folder}/zero.json\n"
    (folder / "run.yaml").write_text(options)
    config = load(folder / "run.yaml", []).config
    assert config is not None
    return facts(config, ZeroConfig.load(config))


def on(host: str, found: dict[str, Any]) -> dict[str, Any]:
    return {**copy.deepcopy(found), "host": host}


def test_alike_nodes_do_not_differ(mine: dict[str, Any]) -> None:
    everyone = [on("n1", mine), on("n1", mine), on("n2", mine)]
    assert differences(everyone) == problems_of(everyone) == remarks(everyone) == []
    assert summary(everyone) == "3 ranks on CPUs, on 2 nodes: n1, n2"


def test_every_file_of_the_package_counts(mine: dict[str, Any]) -> None:
    assert len(mine["code"]) == len(list(Path(dsdpo.__file__).parent.rglob("*.py"))) and "train/loop.py" in mine["code"]


@pytest.mark.parametrize(
    ("group", "name", "value", "said"),
    [
        ("versions", "torch", "2.0.0", "torch is 2.0.0, on n1 it is"),
        ("versions", "python", "3.9.1", "python is 3.9.1"),
        ("code", "train/loop.py", "x", "dsdpo/train/loop.py is another file than on n1"),
        ("code", "new.py", "x", "dsdpo/new.py is another file"),
        ("config", "beta", 0.5, "run config: beta is 0.5, on n1 it is 0.1"),
        ("files", "deepspeed", "x", "the DeepSpeed JSON is missing, or another one"),
        ("files", "model", "x", "the model's config.json is missing, or another one"),
    ],
)
def test_what_differs_is_told_once_with_the_hosts(
    mine: dict[str, Any], group: str, name: str, value: Any, said: str
) -> None:
    other = on("n2", mine)
    other[group][name] = value
    [line] = differences([on("n1", mine), other, on("n3", other), on("n3", other)])
    assert line.startswith("n2, n3: ") and said in line


def test_a_file_that_is_missing_elsewhere(mine: dict[str, Any]) -> None:
    other = on("n2", mine)
    del other["files"]["deepspeed"], other["code"]["cli.py"]
    lines = differences([on("n1", mine), other])
    assert any("DeepSpeed JSON is missing" in line for line in lines) and any("dsdpo/cli.py" in line for line in lines)


def test_troubles_are_told_once_with_the_hosts(mine: dict[str, Any]) -> None:
    trouble = [
        Problem("config-file", "", "there is no file run.yaml"),
        Problem("dataset-dir", "dataset_dir", "no folder"),
    ]
    there = facts(None, None, ConfigError(trouble))
    everyone = [on("n1", mine), on("n2", there), on("n2", there), on("n3", facts(None, None, IOFailure("disk full")))]
    assert problems_of(everyone) == ["n2: there is no file run.yaml", "n2: no folder", "n3: disk full"]
    assert everyone[3]["trouble"][0] == 74


def test_other_gpus_are_a_remark(mine: dict[str, Any]) -> None:
    one, other = on("n1", mine), on("n2", mine)
    one["devices"], other["devices"] = [["NVIDIA A", 80]], [["NVIDIA B", 40]]
    [line] = remarks([one, other])
    assert "NVIDIA A (80 GB) on n1; NVIDIA B (40 GB) on n2" in line
    assert not differences([one, other]) and summary([one]) == "1 ranks of NVIDIA A, 80 GB, on 1 node: n1"


def test_missing_ranks_are_named() -> None:
    line = missing(Mesh(0, 4, 0), [0, 2], ["n1", "n2"], 45.0)
    assert line.startswith("ranks 1, 3 of 4 did not come within 45 s (those on n1, n2 did)")
    assert missing(Mesh(0, 99, 0), [0], ["n1"], 45.0).count(",") < 20


def test_a_long_report_is_cut(mine: dict[str, Any]) -> None:
    other = on("n2", mine)
    other["code"] = dict.fromkeys(other["code"], "x")
    lines = differences([on("n1", mine), other])
    assert len(lines) == 13 and lines[-1].endswith("more")
    assert str(NodesDiffer(lines[:1])).startswith("1 difference between the nodes:\n  1. n2")
