"""The files that make the repository a package and a project are complete and agree with each other."""

import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from catalogue import CONF

import llm
from llm.commands import crucible
from llm.config import conf
from llm.errors import ConfigError

ROOT = CONF.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yml").read_text())
VERSIONS = ["3.11", "3.12", "3.13"]


def place_package(root, monkeypatch):
    """Pretend that the packages lie in `root`, as in site-packages."""
    monkeypatch.setattr(conf, "__file__", str(root / "llm" / "config" / "conf.py"))
    (root / "llm" / "config").mkdir(parents=True)


def test_an_installed_package_finds_its_configuration_inside_itself(tmp_path, monkeypatch):
    place_package(tmp_path, monkeypatch)
    (tmp_path / "llm" / "conf").mkdir()
    (tmp_path / "llm" / "conf" / "train.yaml").touch()
    assert conf.conf_folder() == tmp_path / "llm" / "conf"


def test_a_package_without_its_configuration_is_one_line(tmp_path, monkeypatch):
    place_package(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"missing from this installation; reinstall with `pip install \.`"):
        conf.conf_folder()


def test_every_console_script_names_a_function():
    for target in PROJECT["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("name", crucible.SCRIPTS)
def test_a_subcommand_runs_as_its_script_so_that_ranks_and_jobs_can_start_it_again(name, monkeypatch):
    seen = []
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/crucible", name, "a=1"])
    monkeypatch.setattr("llm.commands.cli.run_command", lambda *_, **__: seen.extend(sys.argv))
    crucible.main()
    assert seen == [str(ROOT / f"{name}.py"), "a=1"]


def test_the_script_of_an_installed_package_lies_inside_it(tmp_path, monkeypatch):
    place_package(tmp_path, monkeypatch)
    (tmp_path / "llm" / "conf").mkdir()
    (tmp_path / "llm" / "conf" / "train.yaml").touch()
    assert conf.entry_script("train") == tmp_path / "llm" / "entry" / "train.py"


def test_an_unknown_subcommand_is_a_mistake_that_lists_the_known_ones(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["crucible", "trian"])
    with pytest.raises(SystemExit) as stopped:
        crucible.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: trian: unknown command; did you mean train?")
    assert all(command in error for command in crucible.COMMANDS)


def test_the_package_cannot_be_uploaded_and_names_its_licence():
    assert "Private :: Do Not Upload" in PROJECT["classifiers"]
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()


def test_python_versions_agree_between_the_package_and_the_workflow():
    named = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d", c)]
    assert named == WORKFLOW["jobs"]["checks"]["strategy"]["matrix"]["python"] == VERSIONS
    assert PROJECT["requires-python"] == ">=3.11,<3.14"


def test_the_workflow_runs_the_checks_of_the_repository():
    commands = [step.get("run", "") for step in WORKFLOW["jobs"]["checks"]["steps"]]
    assert any(".ci/run" in command for command in commands)
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_every_tool_of_the_commit_hooks_is_a_development_dependency():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    tools = {hook["entry"].split()[0] for hook in hooks}
    assert tools == {"ruff", "lint-imports", "python"}
    for hook in hooks:
        if hook["entry"].startswith("python "):
            assert (ROOT / hook["entry"].split()[1]).is_file()


def test_the_citation_parses_and_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation.keys() >= {"cff-version", "message", "title", "authors", "type"}
    assert citation["version"] == llm.__version__
    assert citation["license"] == PROJECT["license"]


def test_an_unsupported_system_is_answered_with_one_line(monkeypatch):
    source = Path(llm.__file__).read_text()
    monkeypatch.setattr("os.name", "nt")
    with pytest.raises(SystemExit) as stopped:
        exec(compile(source, "llm/__init__.py", "exec"), {"__name__": "llm"})
    monkeypatch.undo()
    message = str(stopped.value)
    assert "Windows Subsystem for Linux" in message
    assert "\n" not in message
