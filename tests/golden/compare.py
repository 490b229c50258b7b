"""Golden runs: short runs on a base commit and on the working tree, on this machine, and how they differ.

    python -m tests.golden.compare --base COMMIT [--exact | --tolerance] [--only NAME ...]

The results of the base commit are kept in .cache/golden, so that a second comparison trains on the tree alone. The exit
code is 1 where a run differs or fails, or the history does not hold the commit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.golden.cases import CASES, Case
from tests.golden.differences import Comparison, Mode, compare
from tests.golden.runs import ROOT, RunFailed, Side, base_cache, extract_package, own_kernels, resolve, save_inputs


class Golden:
    """Both sides of a comparison.

    Args:
        commit: full hash of the base commit.
        folder: empty, for the runs.
    """

    def __init__(self, commit: str, folder: Path) -> None:
        inputs = folder / "inputs"
        save_inputs(inputs)
        self._initial = inputs / "model" / "model.safetensors"
        code = extract_package(commit, folder / "base-package")
        self._base = Side(f"base {commit[:7]}", code, inputs, folder / "base", base_cache(commit), own_kernels(code))
        self._tree: dict[Mode, Side] = {
            "exact": Side("working tree", ROOT, inputs, folder / "tree", options=own_kernels(ROOT)),
            "tolerance": Side("working tree", ROOT, inputs, folder / "tree-kernels"),
        }
        for side in (self._base, *self._tree.values()):
            side.check_package()

    def compare(self, case: Case, mode: Mode) -> Comparison:
        """Train a case on both sides where there is no result yet, and compare. Raises RunFailed.

        Exact mode takes `kernels: none`, which alone repeats the bits of the base.
        """
        return compare(self._base.result(case), self._tree[mode].result(case), self._initial, mode)


def main(arguments: list[str] | None = None) -> int:
    """Compare, print a table and the differences; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", required=True, metavar="COMMIT")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--exact", dest="mode", action="store_const", const="exact", help="equal bits with kernels: none (the default)"
    )
    modes.add_argument(
        "--tolerance",
        dest="mode",
        action="store_const",
        const="tolerance",
        help="equal to rounding with the default kernels",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[case.name for case in CASES])
    args = parser.parse_args(arguments)
    commit = resolve(args.base)
    if commit is None:
        sys.exit(f"golden: no commit {args.base} in this checkout; a shallow clone gets it with git fetch --unshallow")
    cases = [case for case in CASES if not args.only or case.name in args.only]
    mode: Mode = args.mode or "exact"
    print(f"{'run':<24} {'losses':>9} {'weights':>9}  {mode}", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        golden = Golden(commit, Path(folder))
        for case in cases:
            try:
                found = golden.compare(case, mode)
            except RunFailed as error:
                failed += 1
                print(f"{case.name:<24} {'':>9} {'':>9}  FAILED\n{error}", flush=True)
            else:
                failed += bool(found.differences)
                print(row(case.name, found), flush=True)
    print(f"{failed} of {len(cases)} runs differ from {commit[:7]}, or failed")
    return int(failed > 0)


def row(name: str, found: Comparison) -> str:
    """A line of the table, and what differs below it: the first differences of a run, the rest is a consequence."""
    worst = f"  worst tensor: {found.worst}" if found.worst else ""
    lines = [f"{name:<24} {found.loss:>9.1e} {found.weights:>9.1e}  {found.verdict}{worst}"]
    lines += [f"    {line}" for line in found.differences[:5]]
    if len(found.differences) > 5:
        lines.append(f"    and {len(found.differences) - 5} more")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
