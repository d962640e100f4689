"""Judges a finished run from its folder alone: validation loss as training measures it, and text."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import lightning as L
import torch

from llm.attention.concentration import concentration_by_layer
from llm.checkpoint import compare_state, load_model
from llm.config import RunConfig, accelerator, batch_plan, build_data, build_model, check, load, run_config, world_size
from llm.errors import CheckpointError, ConfigError, did_you_mean
from llm.generate import check_sampling
from llm.module import LanguageModule
from llm.precision import resolve_precision
from llm.signatures import fits, suggest, type_name
from llm.training import build_module

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The keys of conf/eval.yaml."""

    run_dir: str
    checkpoint: str
    evals: list[str]
    prompts: list[str]
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    use_cache: bool
    context_length: int | None = None
    model: dict[str, Any] | None = None
    """`position`: the node of another position to read with; none of them has weights."""


@dataclass(frozen=True)
class TrainedRun:
    """A run rebuilt from its folder: its configuration, data, and module with the checkpoint's weights."""

    folder: Path
    config: dict[str, Any]
    data: Any
    module: LanguageModule
    device: torch.device
    precision: str


def evaluate(cfg: dict[str, Any], path: Path) -> float | None:
    """Do what `evals` lists, write `eval/<name>.json` in the run folder, and return the validation loss if measured.

    Raises:
        ConfigError: an unknown key or evaluation, or a folder that holds no run.
        CheckpointError: weights that are missing, damaged, or of another architecture.
    """
    config = check_eval(cfg)
    position = (config.model or {}).get("position")
    run = rebuild(Path(config.run_dir), config.checkpoint, position=position, context_length=config.context_length)
    results = {name: EVALS[name](run, config) for name in config.evals}
    for name, result in results.items():
        (path / f"{name}.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return results.get("loss", {}).get("val/loss")


def check_eval(cfg: Mapping[str, Any]) -> EvalConfig:
    """Return the evaluation's settings, or raise ConfigError with every mistake in them."""
    hints = get_type_hints(EvalConfig)
    problems = [f"{key}={cfg[key]}: unknown key{suggest(key, hints)}" for key in cfg if key not in hints]
    problems += [
        f"{f.name}={cfg[f.name]!r}: must be {type_name(hints[f.name])}"
        for f in fields(EvalConfig)
        if f.name in cfg and not fits(cfg[f.name], hints[f.name])
    ]
    for name in cfg["evals"] or []:
        if name not in EVALS:
            problems.append(f"evals={name}: no such evaluation{did_you_mean(name, EVALS)}; choose from {[*EVALS]}")
    if problems:
        raise ConfigError("\n".join(problems))
    sampling = ("max_new_tokens", "temperature", "top_k", "top_p")
    check_sampling(**{key: cfg[key] for key in sampling})
    return EvalConfig(**cfg)


def rebuild(
    folder: Path,
    checkpoint: str,
    *,
    position: Mapping[str, Any] | None = None,
    context_length: int | None = None,
) -> TrainedRun:
    """Rebuild data, model and weights of a run from its folder.

    Args:
        folder: the run folder.
        checkpoint: name of a checkpoint in it.
        position: node of another position to read with, or None for the run's own.
        context_length: tokens a window, or None for the run's own.

    Raises:
        ConfigError: the folder holds no run, or its configuration is not valid.
        CheckpointError: the checkpoint is missing, damaged, or does not fit the configuration or the tokenizer.
    """
    cfg = load(folder / "config.yaml")
    if position is not None:
        cfg["model"]["position"] = dict(position)
    if context_length is not None:
        _set_context_length(cfg, context_length)
    check(cfg)
    run = run_config(cfg)
    weights = checkpoint_folder(folder, checkpoint)
    data = build_data(cfg, batch_plan(cfg).micro_batch_size)
    data.prepare_data()
    data.setup("validate")
    state = {name.removeprefix("model."): tensor for name, tensor in load_model(weights).items()}
    check_vocabulary(state, data.tokenizer.vocab_size, weights)
    module = _load(cfg, run, data, state, weights)
    device = torch.device(accelerator(cfg["trainer"]))
    precision = resolve_precision(cfg["trainer"]["precision"], accelerator=device.type)
    return TrainedRun(folder, cfg, data, module.to(device).eval(), device, precision)


def _set_context_length(cfg: dict[str, Any], context_length: int) -> None:
    """Read windows of another length, as many tokens at a time as before."""
    if context_length < 1:
        raise ConfigError(f"context_length={context_length}: must be at least 1; try {4 * cfg['context_length']}")
    windows = max(1, batch_plan(cfg).micro_batch_size * cfg["context_length"] // context_length)
    cfg["context_length"], cfg["micro_batch_size"] = context_length, windows
    cfg["batch_tokens"] = context_length * windows * world_size(cfg["trainer"])


def _load(
    cfg: Mapping[str, Any], run: RunConfig, data: Any, state: dict[str, torch.Tensor], weights: Path
) -> LanguageModule:
    model = build_model(cfg, data.tokenizer.vocab_size)
    compare_state(state, model.state_dict(), source=f"checkpoint={weights}")
    model.load_state_dict(state)
    return build_module(cfg, run, model, data.tokenizer)


def check_vocabulary(state: Mapping[str, torch.Tensor], vocab_size: int, source: Path) -> None:
    """Raise CheckpointError where the weights were trained with a vocabulary of another size."""
    trained = state["token_embedding.weight"].shape[0]
    if trained != vocab_size:
        raise CheckpointError(
            f"tokenizer: has {vocab_size} tokens and the weights in {source} were trained with {trained}; use the "
            "tokenizer.json in the run folder (tokenizer=pretrained tokenizer.path=<run folder>)"
        )


def checkpoint_folder(folder: Path, checkpoint: str) -> Path:
    """Return the folder of a named checkpoint; raise CheckpointError with what there is instead."""
    path = folder / "checkpoints" / checkpoint
    if path.is_dir():
        return path.resolve()
    there = sorted(p.name for p in (folder / "checkpoints").glob("*") if p.is_dir())
    raise CheckpointError(f"checkpoint={checkpoint}: not in {folder / 'checkpoints'}; choose one of {there}")


def evaluate_loss(run: TrainedRun, config: EvalConfig) -> dict[str, float]:
    """Measure the validation loss by the code and in the precision that training uses."""
    trainer = L.Trainer(
        accelerator="gpu" if run.device.type == "cuda" else "cpu",
        devices=1,
        precision=run.precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    (metrics,) = trainer.validate(run.module, datamodule=run.data, verbose=False)
    log.info("val/loss          %.6f nats a token", metrics["val/loss"])
    if "val/bits_per_byte" in metrics:
        log.info("val/bits_per_byte %.6f", metrics["val/bits_per_byte"])
    log.info("val/perplexity    %.4f", metrics["val/perplexity"])
    return {name: float(value) for name, value in metrics.items()}


def evaluate_samples(run: TrainedRun, config: EvalConfig) -> list[str]:
    """Continue the prompts and show the texts."""
    run.module.to(run.device)
    with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=run.precision == "bf16-mixed"):
        texts = run.module.generate_text(
            config.prompts,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
            use_cache=config.use_cache,
        )
    for text in texts:
        log.info("%s\n%s", "-" * 60, text)
    return texts


def evaluate_concentration(run: TrainedRun, config: EvalConfig) -> list[dict[str, float]]:
    """Measure how concentrated each layer's attention is, on the first validation batch."""
    batch = next(iter(run.data.val_dataloader()))
    keys = ("input_ids", "positions", "document_ids")
    ids, positions, documents = (batch[key].to(run.device) for key in keys)
    model = run.module.model.to(run.device)
    layers = concentration_by_layer(model, ids, positions=positions, document_ids=documents)
    log.info("layer  sparsity  keys in effect  entropy, nats")
    for index, layer in enumerate(layers):
        log.info("%5d  %8.4f  %14.1f  %13.3f", index, layer["sparsity"], layer["effective_keys"], layer["entropy"])
    return layers


EVALS: dict[str, Callable[[TrainedRun, EvalConfig], Any]] = {
    "loss": evaluate_loss,
    "samples": evaluate_samples,
    "concentration": evaluate_concentration,
}
