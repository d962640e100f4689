"""Computes the losses, gradients and first non-finite layer of a step's windows again, one window at a time."""

import contextlib
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm.callbacks.bad_steps import FILE
from llm.commands.cli import run_plain_command
from llm.config.settings import settings
from llm.contracts import WHOLE_UPDATE
from llm.errors import ConfigError
from llm.evals.evaluation import on_device
from llm.ops.noise import KeyedNoise
from llm.run_folder.checkpoint_files import list_checkpoints
from llm.run_folder.folder import RunFolder
from llm.run_folder.rollback import read_rollbacks
from llm.tables import format_table
from llm.training.rebuild import TrainedRun, rebuild

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Settings of a replay; see conf/replay.yaml."""

    run_dir: str
    step: int
    checkpoint: str | None = None


@dataclass(frozen=True)
class Replayed:
    """The figures of one window.

    Args:
        window: its number in the corpus.
        documents: first and last document in it.
        loss: nats per token, with the losses of sublayers.
        grad_norm: norm of the gradient of this window alone.
        bad: the first module whose output is not finite, `""` for none.
    """

    window: int
    documents: tuple[int, int]
    loss: float
    grad_norm: float
    bad: str


def replay(config: ReplayConfig) -> list[Replayed]:
    """Compute each window of a step with the weights of the nearest earlier checkpoint.

    The windows of a refused update are read from bad_steps.jsonl, because the run may have rolled back since. If the
    checkpoint is older than the previous step, the weights differ from those of the run at that step. `resume=<run
    folder>` then reaches the step again, with the same windows and numbers.

    Raises:
        ConfigError: the step does not exist, or has no earlier checkpoint.
    """
    folder = Path(config.run_dir)
    name = config.checkpoint or _before(folder, config.step)
    run = rebuild(folder, name)
    total = run.module.total_steps
    if not 1 <= config.step <= total:
        raise ConfigError(f"step={config.step}: the run has steps 1 to {total}; choose one of bad_steps.jsonl")
    run.data.leave_out(entry["left_out"] for entry in read_rollbacks(RunFolder(folder, is_writer=False)))
    windows = _refused(folder, config.step) or run.data.windows_of_step(config.step - 1)
    documents = run.data.documents_in(windows)
    run.module.train()
    found = [
        _one(run, window, documents[row], KeyedNoise(run.config.run.seed, config.step - 1, torch.tensor([row])))
        for row, window in enumerate(windows)
    ]
    log.info("step %d with the weights of %s", config.step, name)
    rows = [
        [str(r.window), f"{r.documents[0]}-{r.documents[1]}", f"{r.loss:.4f}", f"{r.grad_norm:.4g}", r.bad]
        for r in found
    ]
    log.info(format_table(["window", "documents", "loss", "grad_norm", "first not finite"], rows))
    return found


def _refused(folder: Path, step: int) -> list[int]:
    """Return the windows of the last refused update at a step, empty where none was refused."""
    path = folder / FILE
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    parts = next((line["micro_batches"] for line in reversed(lines) if line["step"] == step), [])
    return [window for part in parts for window in part["windows"]]


def _before(folder: Path, step: int) -> str:
    there = [name for at, path in list_checkpoints(folder / "checkpoints") if at < step for name in [path.name]]
    if not there:
        raise ConfigError(
            f"step={step}: {folder} has no checkpoint before it; choose a later step, or checkpoint=<name>"
        )
    return there[-1]


def _one(run: TrainedRun, window: int, documents: tuple[int, int], noise: KeyedNoise) -> Replayed:
    batch = on_device(run.data.windows("train")[window], run.device)
    model, objective = run.module.model, run.module.objective
    model.zero_grad(set_to_none=True)
    with (
        _first_bad(model) as bad,
        torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=run.precision.endswith("mixed")),
    ):
        prepared = objective.prepare(model, batch, noise._replace(rows=noise.rows.to(run.device)))
        out = model(**prepared.inputs)
        loss, _ = objective.loss(model, model, prepared, out, WHOLE_UPDATE)
    for extra in out.losses.values():
        loss = loss + extra
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    value = float(loss.detach())
    return Replayed(window, documents, value, float(norm), bad[0] if bad else _worst(value))


def _worst(loss: float) -> str:
    return "" if math.isfinite(loss) else "loss"


@contextlib.contextmanager
def _first_bad(model: nn.Module) -> Iterator[list[str]]:
    """Yield a list that gets the names of modules whose outputs are not finite, in the order of the forward pass."""
    bad: list[str] = []

    def watch(name: str) -> Any:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            tensors = [output] if isinstance(output, Tensor) else list(output) if isinstance(output, tuple) else []
            if any(isinstance(t, Tensor) and t.is_floating_point() and not t.isfinite().all() for t in tensors):
                bad.append(name)

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield bad
    finally:
        for handle in handles:
            handle.remove()


def check_replay(cfg: dict[str, Any]) -> ReplayConfig:
    """Return the settings, or raise ConfigError with every mistake in them."""
    return settings(ReplayConfig, cfg)


def main() -> None:
    """Run the replay that the command line describes."""
    run_plain_command(lambda cfg: replay(check_replay(cfg)), config_name="replay")
