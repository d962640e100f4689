"""A run that was killed at any moment resumes to the same losses."""

import random
import signal

import pytest
from fault_harness import Fault, Kill, flip, truncate

from llm.run_folder.checkpoint_files import list_checkpoints, step_folder

# a checkpoint of these runs takes some 20 ms to write; the moments cover all of that
MOMENTS = 0.03
SLOW_DISK = """
import time, torch
write, written = torch.save, []
def save_slowly(*given, **named):
    written.append(time.sleep(100 if written else 0))
    write(*given, **named)
torch.save = save_slowly
"""
"""Every checkpoint but the first takes minutes."""


def test_a_run_killed_while_it_saves_resumes_and_leaves_no_partial_file(fault, steady):
    killed = fault.run(kill=Kill(while_saving=0.005))
    assert killed.status == -signal.SIGKILL
    assert killed.summary["status"] == "running"
    steps = sorted(killed.losses)
    assert steps == list(range(1, len(steps) + 1))
    assert killed.whole
    done = fault.run(f"resume={fault.folder}")
    assert done.status == 0, done.err
    assert done.losses == steady
    assert done.leftovers == []
    assert done.summary["status"] == "finished"
    damage(done.folder)
    again = fault.run(f"resume={fault.folder}")
    assert again.status == 0, again.err
    assert "skipped step-00000040: model.safetensors" in again.said
    assert again.losses == steady


def damage(folder):
    """Cut a byte off the newest checkpoint."""
    truncate(step_folder(folder / "checkpoints", 40) / "model.safetensors")


RANKS = {
    1: (),
    2: ("trainer=deepspeed", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.stage=2", "micro_batch_size=2"),
}
OFTEN = ("max_steps=40", "checkpoint_every=1", "callbacks.samples=null")
KILLS = 2
"""Of each of ten runs."""


@pytest.fixture(scope="module", params=RANKS)
def often(request, tiny, tmp_path_factory):
    """Overrides of a run that saves at every update, and its losses when nothing happens to it."""
    replaced = {override.split("=")[0] for override in RANKS[request.param]}
    base = [o for o in tiny if o.split("=")[0] not in replaced] + [*RANKS[request.param], *OFTEN]
    whole = Fault(base=base, cwd=tmp_path_factory.mktemp("often")).run()
    assert whole.status == 0, whole.err
    return base, whole.losses


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_twenty_kills_at_random_moments_of_saving_give_twenty_good_resumes(often, tmp_path, seed):
    """Each kill is resumed; the end is that of an undisturbed run, bit for bit."""
    base, losses = often
    fault, chance, reached = Fault(base=base, cwd=tmp_path), random.Random(seed), 0
    for kills in range(KILLS):
        again = [f"resume={fault.folder}"] if kills else []
        killed = fault.run(*again, kill=Kill(while_saving=chance.uniform(0, MOMENTS), to_group=True))
        assert killed.status == -signal.SIGKILL
        assert len(killed.whole) >= 1
        assert max(killed.whole) >= reached  # nothing that was whole is lost
        reached = max(killed.whole)
    done = fault.run(f"resume={fault.folder}")
    assert done.status == 0, done.err
    assert done.losses == losses
    assert done.leftovers == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_signal_to_the_whole_group_saves_a_checkpoint_and_the_run_resumes(fault, steady, number, workers):
    fault.base += [f"loader.num_workers={workers}"]
    stopped = fault.run(kill=Kill(number, at_step=6, to_group=True))
    assert stopped.status == 128 + number, stopped.err
    assert stopped.summary["status"] == f"stopped: {number.name}"
    assert stopped.summary["steps"] in stopped.whole
    done = fault.run(f"resume={fault.folder}", f"loader.num_workers={2 - workers}")
    assert done.status == 0, done.err
    assert done.losses == steady


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once_and_older_checkpoints_stay_whole(fault, steady):
    fault.patch = SLOW_DISK
    stopped = fault.run(kill=Kill(signal.SIGINT, at_step=6, times=2))
    assert stopped.status == 130, stopped.err
    assert stopped.whole == [4]  # the one that was being written is not waited for
    fault.patch = ""
    done = fault.run(f"resume={fault.folder}")
    assert done.status == 0, done.err
    assert done.losses == steady
    assert done.leftovers == []


@pytest.mark.slow
def test_a_bit_flipped_anywhere_in_a_checkpoint_is_noticed(fault, steady):
    fault.run()
    chance = random.Random(1)
    for _ in range(6):
        _, newest = list_checkpoints(fault.folder / "checkpoints")[-1]
        victim = chance.choice(sorted(path for path in newest.iterdir() if path.is_file()))
        flip(victim, chance=chance)
        done = fault.run(f"resume={fault.folder}")
        # a flipped bit in the manifest's own notes (a version) changes nothing that is loaded
        assert done.status == 0, done.err
        assert "skipped step-" in done.said or victim.name == "manifest.json"
        assert done.losses == steady
