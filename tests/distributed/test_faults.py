"""Faults that must be detected: mutants of the update, ranks that diverge or fail, settings without effect."""

import os
import signal
import sys

import lightning as L
import pytest
from distributed_helpers import distance
from lightning.fabric.utilities.rank_zero import rank_zero_only

from llm.config.check import check
from llm.config.sizes import topology
from llm.distributed.launch import find_launch, start_processes
from llm.distributed.zero import engine_settings
from llm.errors import ConfigError
from llm.scaling.batching import plan_batch
from llm.training.module_and_trainer import own_environment

FP32 = "trainer.precision=32-true"


@pytest.fixture(scope="module")
def session(runs):
    """Mutants in sessions of their own: what one changes would stay for the next job."""
    muon = ("optimizer=muon", "optimizer.matmul_dtype=float32", FP32)
    runs.alone("muon", *muon)
    for mutant in ("clip_after_the_update", "forget_layouts", "poison_second_rank", "drift"):
        runs.plan(mutant, *muon, "trainer.stage=2", "max_steps=4", mutant=mutant, may_fail=True)
        runs.launch()
    return runs


def answer(session, name, rank=0):
    return (session.out / name / f"answer{rank}").read_text()


@pytest.mark.slow
def test_clipping_after_the_update_would_not_pass_for_equal(session):
    assert answer(session, "clip_after_the_update") == "finished"
    loss, weight = distance(session.out / "clip_after_the_update", session.out / "muon")
    assert loss > 2e-3  # a hundred times what the test of equality allows
    assert weight > 2e-3


@pytest.mark.slow
def test_shards_without_their_layout_are_not_stepped(session):
    assert "ShapeError" in answer(session, "forget_layouts")


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_on_one_rank_stops_all_at_the_same_step(session):
    for rank in (0, 1):
        assert "at step 4: not finite, and nothing was updated" in answer(session, "poison_second_rank", rank)


@pytest.mark.slow
def test_ranks_that_drift_apart_are_found_and_the_tensor_is_named(session):
    for rank in (0, 1):
        assert "ranks differ at step 3 in 1 tensors, first model.final_norm.weight" in answer(session, "drift", rank)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("trainer.stage=4",), "trainer.stage=4: must be one of 0, 1, 2, 3"),
        (("trainer.stagee=2",), r"trainer.stagee=2: unknown key; did you mean stage\?"),
        (("trainer.stage=0", "trainer.precision=bf16-true"), "takes a step of its own at the start"),
        (("trainer.stage=1", "trainer.precision=bf16-true"), "trainer.precision=bf16-true: at trainer.stage=1"),
        (("trainer.precision=64-true",), "trainer.precision=64-true: the engine has no fp64"),
        (("trainer.offload_parameters=true",), "trainer.offload_parameters=true: at trainer.stage=2"),
        (("trainer.stage=0", "trainer.offload_optimizer=true"), "stage 0 keeps all on the device"),
        (("trainer.stage=3", "compile=true"), "compile=true: stage 3 fetches weights in hooks"),
        (("trainer.timeout_seconds=0",), "trainer.timeout_seconds=0"),
        (("trainer.devices=3",), "batch_tokens=256: must be a multiple of context_length 32 x devices 3"),
        (
            ("optimizer=tiger", "optimizer.accumulate=momentum", "trainer.gradient_clip_val=null"),
            "optimizer.accumulate=momentum: works on one device with whole tensors",
        ),
    ],
)
def test_unsupported_settings_are_refused(composed, tiny, overrides, message):
    kept = [t for t in tiny if not t.startswith("trainer")]
    added = [f"+{o}" if o.startswith("trainer.stagee") else o for o in overrides]
    with pytest.raises(ConfigError, match=message):
        check(composed(*kept, "trainer=deepspeed", "trainer.accelerator=cpu", *added))


def test_without_deepspeed_the_error_names_the_remedy(monkeypatch):
    monkeypatch.setattr(engine_settings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install deepspeed==0\.19\.8"):
        engine_settings.require_deepspeed()


def test_a_batch_that_does_not_divide_over_ranks_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="try 2048 or 3072"):
        plan_batch(batch_tokens=2560, context_length=256, world_size=4, micro_batch_size=1)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, ("torchrun", 3, 4, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, ("train.py", 1, 2, 2)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_SIZE": "4", "LOCAL_RANK": "1"}, ("deepspeed", 5, 8, 4)),
        (
            {"SLURM_PROCID": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"},
            ("srun", 2, 4, 2),
        ),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"}, None),
    ],
)
def test_launchers_are_known_by_their_environment(environment, expected):
    assert find_launch(environment) == expected


def test_a_trainer_for_one_device_is_refused_under_a_launcher(monkeypatch):
    monkeypatch.setattr("llm.distributed.launch.AT_START", {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match=r"trainer\.devices=1: train\.py has started 2 processes"):
        topology({"accelerator": "cpu", "devices": 1})
    assert topology({"accelerator": "cpu", "devices": "auto"}) == (2, 1)


def test_when_a_rank_dies_the_others_are_ended_and_it_is_named(capfd):
    waits = (
        "import os, time, signal; os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGKILL); time.sleep(600)"
    )
    assert start_processes([sys.executable, "-c", waits], processes=3) == 128 + signal.SIGKILL
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: rank 1 was ended by SIGKILL")


def test_the_first_cause_is_printed_last(capfd):
    script = (
        "import os, time\nfrom llm.distributed.launch import note_failure\n"
        "rank = int(os.environ['RANK'])\ntime.sleep(1.0 if rank == 0 else 0.0)\n"
        "try:\n    raise ValueError('a peer is gone' if rank == 0 else 'the real cause')\n"
        "except ValueError as error:\n    note_failure(error)\n    raise\n"
    )
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    assert start_processes([sys.executable, "-c", script], processes=2) == 1
    assert capfd.readouterr().err.splitlines()[-1] == "error: rank 1 failed first: the real cause"


SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NNODES": "1",
}
"""The variables of a batch script with one task."""
OWN_RANK = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0"}


def test_one_slurm_task_with_two_devices_has_the_ranks_of_this_project(monkeypatch):
    for name, value in (SLURM | OWN_RANK).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("llm.distributed.launch.AT_START", SLURM | OWN_RANK)
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # Lightning sets it to 1 for the whole process; it is put back
    plugins = own_environment()
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", plugins=plugins, logger=False)
    assert (trainer.global_rank, trainer.world_size) == (1, 2)


def test_a_process_alone_in_an_allocation_of_four_tasks_trains_alone(monkeypatch):
    allocation = {**SLURM, "SLURM_NTASKS": "4"}
    for name, value in allocation.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("llm.distributed.launch.AT_START", allocation)
    assert L.Trainer(accelerator="cpu", devices=1, plugins=own_environment(), logger=False).world_size == 1


def test_the_ranks_of_srun_and_torchrun_are_left_to_lightning(monkeypatch):
    for environment in (
        {**SLURM, "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"},
        {**OWN_RANK, "TORCHELASTIC_RUN_ID": "x"},
    ):
        monkeypatch.setattr("llm.distributed.launch.AT_START", environment)
        assert own_environment() == []
