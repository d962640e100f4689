"""What each command imports before its first answer. Imports are nearly all of its time."""

import json
import subprocess
import sys

import pytest
import yaml

from llm.config.conf import conf_folder
from llm.config.piece_signature import signature_of
from llm.config.signatures import fits, locate, target_nodes
from llm.config.source_signatures import read_signature

HEAVY = ("torch", "lightning", "deepspeed", "datasets", "matplotlib", "transformers", "scipy", "sympy", "torch._dynamo")

COMMANDS = {
    "help": ["--help"],
    "misspelt key": ["max_step=3"],
    "misspelt key of a piece": ["model.d_modle=3"],
    "plan": ["plan=true", "max_steps=2", "model.num_layers=1"],
    "plans of a sweep": ["-m", "plan=true", "max_steps=2", "model.num_layers=1", "seed=1,2"],
}

ALLOWED = {"plan": {"torch"}, "plans of a sweep": {"torch"}}
"""Heavy modules that a command needs; the others need none."""

SCRIPT = """
import contextlib, io, json, sys
from llm.commands.cli import run_command
from llm.commands.tasks import check_training, run_training
heavy, found = json.loads(sys.argv[1]), {}
for name, arguments in json.loads(sys.argv[2]).items():
    sys.argv = ["train.py", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        run_command(run_training, config_name="train", check=check_training, sweeps=True)
    found[name] = [module for module in heavy if module in sys.modules]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    arguments = [sys.executable, "-c", SCRIPT, json.dumps(HEAVY), json.dumps(COMMANDS)]
    run = subprocess.run(
        arguments, cwd=tmp_path_factory.mktemp("start"), capture_output=True, text=True, check=True, timeout=300
    )
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_imports_no_library_that_its_answer_does_not_need(imported, command):
    assert set(imported[command]) <= ALLOWED.get(command, set())


def _targets() -> list[str]:
    files = [yaml.safe_load(path.read_text()) for path in sorted(conf_folder().rglob("*.yaml"))]
    found = {node["_target_"] for file in files for _, node in target_nodes(file)}
    return sorted(target for target in found if read_signature(target) is not None)


PROBES = [None, True, 1, 1.5, "a", "none", [1], [0.9, 0.95], {"a": 1}]


@pytest.mark.parametrize("target", _targets())
def test_a_signature_that_is_read_from_source_agrees_with_the_imported_one(target):
    read, imported = read_signature(target), signature_of(locate(target))
    assert read.module == imported.module
    assert read.is_open_ended == imported.is_open_ended
    assert list(read.parameters) == list(imported.parameters)
    for name, parameter in imported.parameters.items():
        assert (read.parameters[name].default is parameter.empty) == (parameter.default is parameter.empty), name
        if name in imported.hints:
            answers = [fits(probe, read.hints[name]) for probe in PROBES]
            assert answers == [fits(probe, imported.hints[name]) for probe in PROBES], name


def test_a_member_that_a_check_asks_for_is_found_in_the_source():
    target = "llm.callbacks.noise_scale.NoiseScale"
    assert "least_micro_batches" in read_signature(target).members
    assert hasattr(locate(target), "least_micro_batches")


def test_a_signature_that_its_module_computes_is_not_read_from_source():
    assert read_signature("llm.distributed.deepspeed_trainer.deepspeed_trainer") is None


def test_the_pieces_of_a_default_run_that_import_lightning_are_read_from_source():
    own = yaml.safe_load((conf_folder() / "callbacks" / "default.yaml").read_text())
    assert {"lightning.Trainer", *(node["_target_"] for node in own.values())} <= {*_targets()}


ASKING = """
import sys
from llm.ops.light_start import without_compiler
with without_compiler():
    import torch
    torch._dynamo.disable(print)
    from torch._dynamo import OptimizedModule
import torch._dynamo
assert torch._dynamo.OptimizedModule is OptimizedModule
"""


def test_a_library_that_asks_for_the_compiler_itself_gets_it():
    subprocess.run([sys.executable, "-c", ASKING], check=True)
