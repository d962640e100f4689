"""Builds the wheel: adds `conf/` to it as `llm/conf/`. Everything else about the package is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConf(build_py):
    """Copies the YAML files of `conf/` into the package, except in an editable install, which reads the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "llm", "conf")
            shutil.rmtree(
                target, ignore_errors=True
            )  # a file deleted from conf/ must not survive from an earlier build
            shutil.copytree("conf", target, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithConf})
