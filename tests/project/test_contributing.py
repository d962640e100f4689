"""The worked example of CONTRIBUTING.md works as written, in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
from catalogue import CONF
from conftest import TINY

ROOT = CONF.parent
BLOCKS = [
    textwrap.dedent(block)
    for block in re.findall(
        r"^ *```(?:python|yaml|bash)\n(.*?)^ *```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S
    )
]
FILES = {block.split("\n", 1)[0].removeprefix("# "): block.split("\n", 1)[1] for block in BLOCKS if block[0] == "#"}
COMMANDS = [block.strip() for block in BLOCKS if block[0] != "#"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository with the example's files."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("llm", "data", "conf", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "fixtures"))
    for name in ("train.py", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    for path, text in FILES.items():
        assert not (root / path).exists(), f"{path} is an example; choose another name for the real piece"
        (root / path).write_text(text)
    return root


def run(command, checkout):
    environment = os.environ | {"PYTHONPATH": str(checkout), "CRUCIBLE_CACHE": str(checkout / "cache")}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_example_consists_of_one_class_and_one_option():
    assert sorted(FILES) == ["conf/model/position/p_rope.yaml", "llm/model/position/p_rope.py"]
    assert [command.split()[0] for command in COMMANDS] == ["python", "pytest"]


def test_the_new_option_trains_and_its_setting_reaches_the_run(checkout):
    arguments = COMMANDS[0].split()[1:]
    status, output = run(
        [
            sys.executable,
            *arguments,
            *TINY,
            "data=synthetic",
            "callbacks.samples=null",
            "max_steps=2",
            "hydra.run.dir=run",
        ],
        checkout,
    )
    assert status == 0, output
    assert "share: 0.5" in (checkout / "run" / "config.yaml").read_text()


def test_the_contract_tests_find_and_accept_the_new_option(checkout):
    arguments = COMMANDS[1].split()[1:]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *arguments, "-k", "p_rope"]
    status, output = run(command, checkout)
    assert status == 0, output
    assert int(re.search(r"(\d+) passed", output)[1]) >= 4, output
