"""Puts the files of `dsdpo.runtime.shipped` into a wheel, as dsdpo/_files. All else is in pyproject.toml.

An editable install reads them where they are.
"""

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # a build backend does not run in this folder

from dsdpo.runtime.shipped import PACKED, shipped_files  # noqa: E402


class BuildWithFiles(build_py):
    """Copies the modules, then the shipped files with their modes."""

    def run(self) -> None:
        """Do it; what an earlier build has left in the build folder goes first."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "dsdpo" / PACKED
        shutil.rmtree(target, ignore_errors=True)
        for file in shipped_files(HERE):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(HERE / file, target / file)


setup(cmdclass={"build_py": BuildWithFiles})
