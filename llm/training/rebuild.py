"""Rebuilds a trained run from its folder: the decoder and its tokenizer, and optionally its data."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm.config.build import adapted, build_data, build_model, build_objective, build_tokenizer
from llm.config.check import check
from llm.config.checked import CheckedConfig
from llm.config.files import load
from llm.config.sizes import batch_plan, world_size
from llm.contracts import Objective
from llm.errors import CheckpointError, ConfigError
from llm.model.transformer import Transformer
from llm.ops.precision import resolve_precision
from llm.run_folder.checkpoint import compare_state
from llm.run_folder.checkpoint_mean import last_checkpoints, mean_state
from llm.training.module import LanguageModule
from llm.training.module_and_trainer import build_module
from llm.training.start import load_initial_weights

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The configuration of a run folder, with the device and precision of this machine."""

    folder: Path
    config: CheckedConfig
    device: torch.device
    precision: str


@dataclass(frozen=True, kw_only=True)
class TrainedModel(Trained):
    """A decoder with a checkpoint's weights, and the tokenizer that it was trained with."""

    model: Transformer
    tokenizer: Any
    objective: Objective


@dataclass(frozen=True, kw_only=True)
class TrainedRun(Trained):
    """A run with its decoder and its data, as needed to measure losses."""

    data: Any
    module: LanguageModule


def rebuild_model(
    folder: Path, checkpoint: str, *, average: int = 1, device: str | None = None, **changes: Any
) -> TrainedModel:
    """Rebuild a run's decoder and tokenizer; the corpus is not needed.

    Args:
        folder: the run folder.
        checkpoint: name of a checkpoint in it.
        average: take the mean of so many checkpoints, this one and those before it.
        device: device of the model; None for the one that the run's trainer would choose here.
        changes: see `read_config`.

    Raises:
        ConfigError: the folder holds no run, or its configuration is not valid.
        CheckpointError: the checkpoint is missing, damaged, or does not fit the configuration or the tokenizer.
    """
    checked = read_config(folder, **changes)
    weights = checkpoint_folder(folder, checkpoint)
    state = trained_state(folder, weights, average)
    tokenizer = saved_tokenizer(folder, checked.tree)
    check_vocabulary(state, tokenizer.vocab_size, weights)
    model = _model_with(checked, tokenizer, state, weights)
    own = _own(folder, checked, device)
    objective = build_objective(checked.tree, vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id)
    return TrainedModel(**own, model=model.to(own["device"]).eval(), tokenizer=tokenizer, objective=objective)


def rebuild(folder: Path, checkpoint: str, *, average: int = 1, **changes: Any) -> TrainedRun:
    """Rebuild data, model and weights of a run from its folder.

    Args:
        folder: the run folder.
        checkpoint: name of a checkpoint in it.
        average: take the mean of so many checkpoints, this one and those before it.
        changes: see `read_config`.

    Raises:
        ConfigError: the folder holds no run, or its configuration is not valid.
        CheckpointError: the checkpoint is missing, damaged, or does not fit the configuration or the tokenizer.
    """
    checked = read_config(folder, **changes)
    weights = checkpoint_folder(folder, checkpoint)
    data = build_data(checked.tree, checked.sizes)
    data.prepare_data()
    data.setup("validate")
    if data.has_own_validation_set:  # published figures are those of the whole set
        data.max_val_tokens = max(data.max_val_tokens, data.val_tokens)
    state = trained_state(folder, weights, average)
    check_vocabulary(state, data.tokenizer.vocab_size, weights)
    model = _model_with(checked, data.tokenizer, state, weights)
    module = build_module(checked, model, data.tokenizer)
    own = _own(folder, checked, device=None)
    return TrainedRun(**own, data=data, module=module.to(own["device"]).eval())


def _own(folder: Path, checked: CheckedConfig, device: str | None) -> dict[str, Any]:
    """Return the fields of `Trained`."""
    place = torch.device(device or checked.sizes.accelerator)
    precision = resolve_precision(checked.tree["trainer"]["precision"], accelerator=place.type)
    return {"folder": folder, "config": checked, "device": place, "precision": precision}


def read_config(
    folder: Path, *, position: Mapping[str, Any] | None = None, context_length: int | None = None
) -> CheckedConfig:
    """Return a run's checked configuration without its callbacks.

    Args:
        folder: the run folder.
        position: node of another position to read with, or None for the run's own.
        context_length: tokens per window, or None for the run's own.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"run_dir={folder}: holds no config.yaml; name a run folder, such as runs/<folder>")
    cfg = load(folder / "config.yaml") | {"callbacks": {}}
    if position is not None:
        _check_turning(cfg["model"]["position"], position)
        cfg["model"]["position"] = dict(position)
    if context_length is not None:
        _set_context_length(cfg, context_length)
    if "path" in cfg.get("tokenizer", {}) and (folder / TOKENIZER).is_file():  # made elsewhere; the run keeps a copy
        cfg["tokenizer"]["path"] = str(folder / TOKENIZER)
    return check(cfg)


def _check_turning(trained: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Refuse another position that turns other parts of a head, or values where training did not."""
    for key, default in (("rotary_share", 1.0), ("turn_values", False)):
        wanted = trained.get(key, default)
        if "base" in trained and "base" in other and other.get(key, default) != wanted:
            remedy = f"model.position.{key}={wanted}" if key in other else "a position with this key, such as rope"
            raise ConfigError(
                f"model.position.{key}={other.get(key, default)}: this run was trained with {wanted}; set {remedy}"
            )


def _set_context_length(cfg: dict[str, Any], context_length: int) -> None:
    """Set another window length and keep the number of tokens per micro-batch."""
    if context_length < 1:
        raise ConfigError(f"context_length={context_length}: must be at least 1; try {4 * cfg['context_length']}")
    windows = max(1, batch_plan(cfg).micro_batch_size * cfg["context_length"] // context_length)
    cfg["context_length"], cfg["micro_batch_size"] = context_length, windows
    cfg["batch_tokens"] = context_length * windows * world_size(cfg["trainer"])
    cfg["batch_schedule"], cfg["keep_half_life"] = None, False
    cfg["scaling"] = {"_target_": "llm.scaling.rules.none", "_partial_": True, "base_batch_tokens": cfg["batch_tokens"]}


def trained_state(folder: Path, weights: Path, average: int) -> dict[str, torch.Tensor]:
    """Return the decoder's weights from one checkpoint, or the mean over several."""
    state = mean_state(last_checkpoints(folder, weights, average))
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def _model_with(checked: CheckedConfig, tokenizer: Any, state: dict[str, torch.Tensor], weights: Path) -> Transformer:
    """Return the decoder with a checkpoint's weights, and with the frozen ones that an adapted run names."""
    cfg = checked.tree
    model = build_model(cfg, tokenizer.vocab_size)
    if cfg.get("adapt"):
        load_initial_weights(checked, model, tokenizer.bos_id, resumed=weights)
        model = adapted(cfg, model)
        own = model.state_dict()
        state = {name: own[name] for name in model.frozen_names} | state
    compare_state(state, model.state_dict(), source=f"checkpoint={weights}")
    model.load_state_dict(state)
    return model


def saved_tokenizer(folder: Path, cfg: Mapping[str, Any]) -> Any:
    """Return the tokenizer that the run saved."""
    file = folder / TOKENIZER
    if not file.is_file():
        raise CheckpointError(f"{file}: missing, so tokens cannot be decoded; restore it from a copy")
    tokenizer = build_tokenizer(cfg)
    if not tokenizer.is_trained:
        tokenizer.load(file.read_text(encoding="utf-8"))
    return tokenizer


def check_vocabulary(state: Mapping[str, torch.Tensor], vocab_size: int, source: Path) -> None:
    """Raise CheckpointError where the weights were trained with a vocabulary of another size."""
    embedding = state.get("token_embedding.weight")
    trained = vocab_size if embedding is None else embedding.shape[0]  # an adapted run compares its frozen weights
    if trained != vocab_size:
        raise CheckpointError(
            f"tokenizer: has {vocab_size} tokens and the weights in {source} were trained with {trained}; use the "
            "tokenizer.json in the run folder (tokenizer=pretrained tokenizer.path=<run folder>)"
        )


def checkpoint_folder(folder: Path, checkpoint: str) -> Path:
    """Return the folder of a named checkpoint; raise CheckpointError with the existing names otherwise."""
    path = folder / "checkpoints" / checkpoint
    if path.is_dir():
        return path.resolve()
    there = sorted(p.name for p in (folder / "checkpoints").glob("*") if p.is_dir())
    raise CheckpointError(f"checkpoint={checkpoint}: not in {folder / 'checkpoints'}; choose one of {there}")
