"""train.py and eval.py as a user calls them, each in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llm.run_folder.checkpoint import load_model

ROOT = Path(__file__).resolve().parent.parent


def command(script, *arguments):
    return [sys.executable, str(ROOT / script), *arguments]


def call(script, *arguments, cwd, **options):
    return subprocess.run(command(script, *arguments), cwd=cwd, capture_output=True, text=True, timeout=240, **options)


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"].hex() for row in rows}


def wait_for_steps(process, folder, steps):
    """Wait until metrics.jsonl has that many lines; the run must still be going."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        path = folder / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= steps:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("the run took no steps")


LONG = ("max_steps=40", "checkpoint_every=7", "val_every=11", "micro_batch_size=2", "model.dropout=0.1")


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = call("train.py", *tiny, *LONG, f"hydra.run.dir={folder}", cwd=folder.parent)
    assert result.returncode == 0, result.stderr
    return folder


def test_a_run_killed_twice_resumes_to_the_same_losses_and_weights(uninterrupted, tiny, tmp_path):
    folder = tmp_path / "run"
    start = command("train.py", *tiny, *LONG, f"hydra.run.dir={folder}")
    for steps in (10, 24):  # neither a checkpoint nor a validation; the second kill hits the resumed run
        process = subprocess.Popen(start, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for_steps(process, folder, steps)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        start = command("train.py", f"resume={folder}")
    result = call("train.py", f"resume={folder}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert losses(folder) == losses(uninterrupted)
    states = [load_model((f / "checkpoints/last").resolve()) for f in (folder, uninterrupted)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_at_a_step_saves_and_tells(uninterrupted, train_here, tiny, tmp_path, number, status):
    folder = tmp_path / "run"
    start = command("train.py", *tiny, *LONG, f"hydra.run.dir={folder}")
    process = subprocess.Popen(start, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(process, folder, 10)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    assert f"resume={folder}" in out + err
    assert json.loads((folder / "summary.json").read_text())["status"] == f"stopped: {number.name}"
    assert train_here(f"resume={folder}")[0] == 0
    assert losses(folder) == losses(uninterrupted)


def test_the_end_of_a_run_tells_loss_bits_text_and_folder(train_here, tiny, tmp_path):
    status, out, _ = train_here(*tiny)
    assert status == 0, out
    (folder,) = (tmp_path / "runs").iterdir()
    for part in ("nats per token", "bits per byte", str(folder), "parameters", "--- step 8 ---"):
        assert part in out, part
    judged = call("eval.py", f"run_dir={folder}", "eval.samples.max_new_tokens=8", cwd=tmp_path)
    assert judged.returncode == 0, judged.stderr
    shown = json.loads((folder / "eval/loss.json").read_text())["val/loss"]
    assert shown == pytest.approx(json.loads((folder / "summary.json").read_text())["val/loss"], abs=1e-6)


def test_a_compiled_run_has_the_losses_of_an_eager_one_to_rounding(train_here, tiny, tmp_path):
    short = [*tiny, "max_steps=3", "val_every=3", "trainer.precision=32-true", "callbacks.samples=null"]
    result = call("train.py", *short, "compile=true", f"hydra.run.dir={tmp_path}/true", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert train_here(*short, "compile=false", f"hydra.run.dir={tmp_path}/false")[0] == 0
    compiled, eager = losses(tmp_path / "true"), losses(tmp_path / "false")
    for step, value in eager.items():
        # the compiler fuses fp32 operations and sums them in another order
        assert float.fromhex(compiled[step]) == pytest.approx(float.fromhex(value), rel=1e-5)


def test_two_processes_train_as_one_does_on_the_same_windows(tiny, tmp_path):
    exact = [t for t in tiny if not t.startswith(("trainer", "micro"))] + [
        "trainer.precision=32-true",
        "micro_batch_size=2",
    ]
    two = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    runs = {"one": ("trainer=cpu",), "two": two}
    for name, choice in runs.items():
        result = call("train.py", *exact, *choice, f"hydra.run.dir={tmp_path}/{name}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    one, two = (losses(tmp_path / name) for name in runs)
    for step, value in one.items():
        # the gradient's sum is taken in another order, in fp32
        assert float.fromhex(two[step]) == pytest.approx(float.fromhex(value), rel=1e-6)


def test_a_sweep_gives_each_job_a_folder(tiny, tmp_path):
    result = call("train.py", "-m", *tiny, "max_steps=2", "seed=1,2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (sweep,) = (tmp_path / "multirun").iterdir()
    seeds = {json.loads(path.read_text())["val/loss"] for path in sweep.glob("*/summary.json")}
    assert len(seeds) == 2
    assert (sweep / "report" / "index.html").is_file()
    assert [job["state"] for job in json.loads((sweep / "manifest.json").read_text())["jobs"]] == ["finished"] * 2


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["optimizer=adamv"], "optimizer=adamv: no such option; did you mean adamw?"),
        (["optimiser=adamw"], "optimiser: unknown key; did you mean optimizer?"),
        (["--max_steps", "5"], "settings take no dashes; write max_steps=5"),
        (["model.num_heads=6"], "model.num_heads=6: must divide model.d_model=128; try 4 or 8"),
        (["batch_tokens=1000"], "batch_tokens=1000: must be a multiple of"),
        (["seed=one"], "seed='one': must be int; got str"),
        (["trainer=gpu"], "trainer.accelerator=gpu: no CUDA device is visible"),
        (["+optimizer.foo=3"], "optimizer.foo=3: unknown key"),
        (["name=../escape"], "name=../escape: may have only letters, digits"),
        (["+wandb_api_key=x"], "secrets do not belong in a configuration"),
        (["model.norm._target_=os.system"], "not on the allow-list"),
        (["data=text"], "data.files=???: a value is needed"),
        (["data=text", "data.files=nowhere/*.txt"], "nowhere"),
        (["resume=nowhere"], "resume=nowhere: holds no config.yaml"),
        (["init_from=nowhere"], "init_from=nowhere: has no checkpoint"),
        (["scaling.base_batch_tokens=null"], "scaling.base_batch_tokens=None: must be at least 1; set the tokens per"),
        (["~scaling.base_batch_tokens"], "scaling.base_batch_tokens: missing; the sqrt rule needs it: set the tokens"),
        (["scaling=sign", "scaling.noise_scale=0"], "scaling.noise_scale=0: must be a number above 0; set the tokens"),
        (["scaling=sign", "scaling.noise_scale=-3"], "scaling.noise_scale=-3: must be a number above 0"),
        (["scaling=sign", "~scaling.noise_scale"], "scaling.noise_scale: missing; the sign rule needs it"),
        (["scaling.noise_scale=41000"], "scaling.noise_scale: unknown key"),
        (
            ["batch_schedule=doubling", "batch_schedule.start_share=0.015625"],
            "batch_schedule: 128 tokens per update from 0 tokens on: must be a multiple of context_length 256",
        ),
        (
            ["batch_schedule=stages", "batch_schedule.shares=[0.3,0.5,1]"],
            "batch_schedule.shares=[0.3, 0.5, 1]: 0.3 gives 2457.6 of batch_tokens=8192; take a share that leaves",
        ),
        (
            ["callbacks=noise_scale", "micro_batch_size=32"],
            "micro_batch_size=32: leaves one micro-batch per update on one device, and callbacks.noise_scale compares "
            "at least 2; set micro_batch_size=16",
        ),
        (["callbacks=noise_scale", "batch_tokens=256"], "compares at least 2; set batch_tokens=512 or more"),
        (
            ["scaling=sign", "batch_tokens=16384", "scaling.base_batch_tokens=256"],
            "scaling.base_batch_tokens=256 must hold at least two windows of context_length 256",
        ),
    ],
)
def test_a_mistake_is_one_clear_line_and_leaves_nothing_behind(train_here, tmp_path, arguments, answer):
    status, _, err = train_here(*arguments)
    assert status == 2, err
    assert answer in err
    assert [line for line in err.splitlines() if not line.startswith("error: ")] == []
    assert not list(tmp_path.glob("runs/*"))


def test_all_mistakes_are_reported_together(train_here):
    status, _, err = train_here("optimizer.lr=-1", "model.num_heads=6", "batch_tokens=1000", "val_every=0")
    assert status == 2
    assert "Traceback" not in err
    for part in ("optimizer.lr=-1", "model.num_heads=6", "batch_tokens=1000", "val_every=0"):
        assert f"error: {part}" in err


def test_a_folder_that_cannot_be_written_is_refused(train_here, tmp_path, tiny):
    (tmp_path / "file").write_text("")
    status, _, err = train_here(*tiny, f"hydra.run.dir={tmp_path}/file/run")
    assert status == 2
    assert "file/run" in err


def test_help_lists_every_group_and_option(tmp_path):
    result = call("train.py", "--help", cwd=tmp_path)
    assert result.returncode == 0
    for path in (ROOT / "conf").rglob("*/*.yaml"):
        assert path.stem in result.stdout
    assert result.stdout.count("python train.py") >= 4


def test_a_plan_counts_and_trains_nothing(train_here, tmp_path):
    status, out, _ = train_here("plan=true", "model/size=124m", "tokenizer.vocab_size=50304")
    assert status == 0, out
    for part in ("123_587_328", "optimizer state", "training FLOPs per token", "token_embedding.weight"):
        assert part in out, part
    assert not list(tmp_path.glob("runs/*"))


def test_wandb_without_a_key_records_offline(tiny, tmp_path):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(tmp_path)}
    arguments = [*tiny, "logger=wandb", "max_steps=2"]
    result = call("train.py", *arguments, cwd=tmp_path, env=clean, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert list(folder.rglob("offline-run-*"))
    assert "wandb sync" in result.stdout + result.stderr
