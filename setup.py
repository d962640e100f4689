"""Builds the wheel. It adds `conf/` as `llm/conf/` and the scripts as `llm/entry/`; pyproject.toml has the rest."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConf(build_py):
    """Copies `conf/` and the scripts into the package; an editable install reads them from the checkout instead."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib, "llm")
        for folder in (package / "conf", package / "entry"):  # a deleted file must not survive from an earlier build
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree("conf", package / "conf")
        (package / "entry").mkdir()
        for script in ("train.py", "eval.py"):
            shutil.copy(script, package / "entry")


setup(cmdclass={"build_py": BuildWithConf})
