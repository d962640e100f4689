"""Compresses a run into a new run folder: `python -m llm.compress run_dir=… method=svd share=0.5 out=<new folder>`."""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llm.adapt.compression import Compressed, Method, dense_width, drop_units, factor, hidden_units
from llm.commands.cli import run_plain_command
from llm.commands.evaluate import subject_of
from llm.config.build import build_model
from llm.config.files import load, save
from llm.config.settings import settings
from llm.distributed.parameters import count_parameters
from llm.errors import ConfigError
from llm.evals.evaluation import on_device
from llm.evals.held_out_loss import loss_sums
from llm.evals.loss_metrics import validation_metrics
from llm.model.transformer import Transformer
from llm.ops.noise import KeyedNoise
from llm.run_folder.checkpoint import save_checkpoint
from llm.run_folder.checkpoint_files import WEIGHTS_ONLY, point, read_manifest, step_folder
from llm.run_folder.folder import RunFolder
from llm.tables import format_table
from llm.training.rebuild import TrainedRun, checkpoint_folder, rebuild

FINAL_NAMES = {"val/bits_per_byte": "bits_per_byte"}
"""Keys of summary.json for figures of a validation."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """The keys of conf/compress.yaml."""

    run_dir: str
    checkpoint: str
    average: int
    method: Method
    out: str
    rank: int | None = None
    share: float | None = None
    curve: list[float] = field(default_factory=list)
    tokens: int = 4096


def compress(config: CompressConfig) -> Path:
    """Write a run folder with compressed weights, and print the loss against the kept share.

    Raises:
        ConfigError: a setting is out of its range, the method does not fit the model, or `out` is not empty.
        CheckpointError: the weights cannot be loaded.
    """
    out = Path(config.out).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={config.out}: exists and is not empty; choose a new folder")
    folder = Path(config.run_dir)
    run = rebuild(folder, config.checkpoint, average=config.average)
    original = subject_of(run).model.float()
    if original.frozen_names:
        raise ConfigError(f"run_dir={config.run_dir}: an adapted run; compress the run that it adapted")
    compressor = Compressor(config, run, original)
    chosen = compressor(rank=config.rank, share=config.share)
    others = [compressor(rank=None, share=share) for share in config.curve if share != config.share]
    found, rows = {}, [measured(run, original, None)[1]]
    for compressed in sorted([chosen, *others], key=lambda each: -each.kept):
        model = build_model({**run.config.tree, "model": compressed.model}, original.vocab_size)
        model.load_state_dict(compressed.state)
        figures, row = measured(run, model.to(run.device).eval(), compressed)
        found, rows = (figures if compressed is chosen else found), [*rows, row]
    log.info(format_table(["kept share", "parameters", "loss", "bits per byte", "settings"], rows))
    write_compressed(run, checkpoint_folder(folder, config.checkpoint), out, chosen, found, method=config.method)
    log.info("compressed   %s to %s; continue with init_from=%s '%s'", folder, out, out, chosen.settings)
    return out


class Compressor:
    """Compresses one decoder at several ranks or shares; its hidden units are computed once.

    Args:
        config: the command's settings.
        run: the run.
        model: its decoder, in fp32.
    """

    def __init__(self, config: CompressConfig, run: TrainedRun, model: Transformer) -> None:
        self.config, self.model, self.node = config, model, run.config.tree["model"]
        self.units = {}
        if config.method != "svd":
            dense_width(model)
            self.units = hidden_units(model, training_inputs(run, model, config.tokens), model)

    def __call__(self, *, rank: int | None, share: float | None) -> Compressed:
        """Return the decoder at a rank or a share."""
        if self.config.method == "svd":
            return factor(self.model, self.node, rank=rank, share=share)
        wanted = {"rank": rank, "share": share, "activations": self.units}
        return drop_units(self.model, self.node, method=self.config.method, **wanted)


def training_inputs(run: TrainedRun, model: Transformer, tokens: int) -> Iterator[dict[str, Any]]:
    """Yield the inputs that the objective makes of about `tokens` training tokens, a window at a time."""
    windows = run.data.windows("train")
    count = min(len(windows), max(1, tokens // run.config.run.context_length))
    for index in range(count):
        place = index * len(windows) // count  # spread over the corpus
        batch = on_device(windows.__getitems__([place]), run.device)
        noise = KeyedNoise(run.config.run.seed, 0, torch.tensor([index], device=run.device))
        yield run.module.objective.prepare(model, batch, noise).inputs


def measured(run: TrainedRun, model: Transformer, compressed: Compressed | None) -> tuple[dict[str, float], list[str]]:
    """Return the validation figures of a decoder, and its row in the table."""
    subject = replace(subject_of(run), model=model, precision="32-true")
    figures = validation_metrics(*loss_sums(subject, run.data))
    total, active = count_parameters(model)
    bits = figures.get("val/bits_per_byte")
    share, text = ("1", "before") if compressed is None else (f"{compressed.kept:.4f}", compressed.settings)
    row = [share, f"{total:_}", f"{figures['val/loss']:.6f}", "-" if bits is None else f"{bits:.6f}", text]
    return figures | {"parameters": total, "active_parameters": active}, row


def write_compressed(
    run: TrainedRun, source: Path, out: Path, compressed: Compressed, figures: Mapping[str, float], *, method: str
) -> None:
    """Write config.yaml, tokenizer, summary and one checkpoint; the folder gets its name when it is complete."""
    temporary = RunFolder(out.with_name(f".tmp-{out.name}-{os.getpid()}"))
    temporary.path.mkdir(parents=True)
    step = int((read_manifest(source) or {}).get("step", 0))
    checkpoint = step_folder(temporary.checkpoints, step)
    state = {f"model.{name}": tensor for name, tensor in compressed.state.items()}
    save_checkpoint(checkpoint, model_state=state, training_state={}, manifest={"step": step, WEIGHTS_ONLY: method})
    for name in ("last", "best"):
        point(temporary.checkpoints / name, checkpoint)
    tree = {**run.config.tree, "model": compressed.model, "callbacks": saved_callbacks(run), "resume": None}
    save({**tree, "init_from": None}, temporary.path / "config.yaml")
    run.data.tokenizer.save(temporary.path)
    summary = RunFolder(run.folder, is_writer=False).read_summary()
    figures = {FINAL_NAMES.get(name, name): value for name, value in figures.items()}
    temporary.write_summary(summary | figures | {"status": "finished", "compressed_from": str(run.folder.absolute())})
    if out.exists():
        out.rmdir()
    temporary.path.rename(out)


def saved_callbacks(run: TrainedRun) -> Any:
    """Return the callbacks of the run's config.yaml, which a rebuilt run does not have."""
    return load(run.folder / "config.yaml").get("callbacks")


def check_compress(cfg: Mapping[str, Any]) -> CompressConfig:
    """Return the settings, or raise ConfigError with every mistake in them."""
    config = settings(CompressConfig, cfg)
    problems = []
    if (config.rank is None) == (config.share is None):
        problems.append(f"rank={config.rank} share={config.share}: set one of them, such as share=0.5")
    if config.rank is not None and config.rank < 1:
        problems.append(f"rank={config.rank}: must be at least 1; try 32")
    if config.tokens < 1:
        problems.append(f"tokens={config.tokens}: must be at least 1; try 4096")
    for key, share in [("share", config.share), *(("curve", share) for share in config.curve)]:
        if share is not None and not 0 < share <= 1:
            problems.append(f"{key}={share}: must lie in (0, 1]; try 0.5")
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def main() -> None:
    """Run the compression that the command line describes."""
    run_plain_command(lambda cfg: compress(check_compress(cfg)), config_name="compress")
