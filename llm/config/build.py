"""Builds the objects of a run from the nodes of its configuration."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from llm.config.pieces import instantiate, piece_at
from llm.config.run import run_config
from llm.config.sizes import Sizes
from llm.contracts import Objective, TrainerChecker
from llm.errors import ConfigError
from llm.model.transformer import Transformer
from llm.ops.storageless import WithoutStorage
from llm.scaling import rules
from llm.scaling.batching import BatchRamp
from llm.scaling.half_life import half_life_note, keep_half_life
from llm.scaling.momentum import momenta
from llm.scaling.rates import Rates

GROUPS = (
    "model", "optimizer", "schedule", "scaling", "batch_schedule", "rates", "data", "tokenizer", "trainer", "logger",
    "callbacks", "loader", "eval", "averaging", "spikes", "objective", "grow", "adapt",
)  # fmt: skip
NEXT_TOKEN = {"_target_": "llm.objective.next_token.NextToken", "_partial_": True}
"""The objective of a configuration without one; version 0.1 had no other."""
CHECK_VOCABULARY = 64
"""Vocabulary size of the model that `check` builds without storage."""


def build_meta_model(cfg: Mapping[str, Any], vocab_size: int = CHECK_VOCABULARY) -> Transformer:
    """Build the model without storage, to check its shapes and rules."""
    with WithoutStorage():
        return adapted(cfg, _prepared_model(cfg, vocab_size))


def _prepared_model(cfg: Mapping[str, Any], vocab_size: int) -> Transformer:
    """Build the model with the inputs that the objective needs; they do not depend on its bos_id."""
    objective = build_objective(cfg, vocab_size=vocab_size, bos_id=0)
    inputs = {"extra_tokens": objective.extra_tokens, "num_times": objective.num_times}
    model = instantiate(cfg["model"])(vocab_size=vocab_size, **inputs)
    build_rates(cfg).prepare(model)
    return model


def build_objective(cfg: Mapping[str, Any], *, vocab_size: int, bos_id: int) -> Objective:
    """Build what the decoder is trained to predict; next tokens where the configuration has no objective."""
    return instantiate(cfg.get("objective") or NEXT_TOKEN)(vocab_size=vocab_size, bos_id=bos_id)


def build_rates(cfg: Mapping[str, Any]) -> Rates:
    """Build the rule for the rate of each tensor."""
    return instantiate(cfg["rates"]) if cfg.get("rates") else Rates()


def build_tokenizer(cfg: Mapping[str, Any]) -> Any:
    """Build the tokenizer of the chosen node; one that is trained on the corpus has no ids yet."""
    return instantiate(cfg["tokenizer"])


def build_data(cfg: Mapping[str, Any], sizes: Sizes) -> Any:
    """Build the data module: a source, a tokenizer, and the loader that turns them into windows."""
    run = run_config(cfg)
    return instantiate(cfg["loader"])(
        source=instantiate(cfg["data"]),
        tokenizer=build_tokenizer(cfg),
        context_length=run.context_length,
        batch_tokens=run.batch_tokens,
        micro_batch_size=sizes.plan.micro_batch_size,
        seed=run.seed,
        ramp=sizes.ramp,
    )


def build_model(cfg: Mapping[str, Any], vocab_size: int) -> Transformer:
    """Build the model with weights drawn from the run's seed."""
    torch.manual_seed(run_config(cfg).seed)
    return _prepared_model(cfg, vocab_size)


def module_factories(
    cfg: Mapping[str, Any], ramp: BatchRamp, *, optimizer: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the optimizer, schedule and scaling factories with the rates that the optimizer's node states.

    Args:
        cfg: the run's configuration.
        ramp: batches of the run.
        optimizer: node of `retuned_optimizer`; None for that of the configuration.
    """
    node = cfg["optimizer"] if optimizer is None else optimizer
    return {
        "optimizer": instantiate(node),
        "lr": float(node["lr"]),
        "weight_decay": float(node["weight_decay"]),
        "schedule": _plain_partial(instantiate(cfg["schedule"])),
        "scaling": _plain_partial(build_scaling(cfg)),
        "ramp": ramp,
        "rates": build_rates(cfg),
        "spikes": instantiate(cfg["spikes"]) if cfg.get("spikes") else None,
    }


def build_scaling(cfg: Mapping[str, Any], *, noise_scale: float | None = None) -> Any:
    """Build the batch rule, with the momentum of the optimizer in use where the rule has `momentum: auto`.

    Args:
        cfg: a configuration whose optimizer has the settings of the base batch.
        noise_scale: takes the place of a noise scale that is not measured yet.
    """
    node = dict(cfg["scaling"])
    if node.get("momentum") == rules.AUTO:
        optimizer, keeps = cfg["optimizer"], bool(cfg.get("keep_half_life"))
        ratio = cfg["batch_tokens"] / node["base_batch_tokens"] if keeps else 1.0
        node["momentum"] = momenta(piece_at(optimizer["_target_"]), optimizer, ratio=ratio, keeps_half_life=keeps)
    return instantiate(node if noise_scale is None else node | {"noise_scale": noise_scale})


def _plain_partial(piece: Any) -> Any:
    """Return a function that each update calls without Hydra's check of its target, which takes 0.2 ms per call."""
    return partial(piece.func, *piece.args, **piece.keywords) if isinstance(piece, partial) else piece


def retuned_optimizer(cfg: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the optimizer's node for the batch of the run, and a note on its half-lives in tokens."""
    node, base = dict(cfg["optimizer"]), cfg["scaling"].get("base_batch_tokens")
    ratio = cfg["batch_tokens"] / base
    lr_scale = build_scaling(cfg)(cfg["batch_tokens"])
    kept = keep_half_life(node, ratio=ratio, lr_scale=lr_scale) if cfg.get("keep_half_life") else node
    is_scaled = piece_at(cfg["scaling"]["_target_"]) is not rules.none or kept != node
    return kept, half_life_note(node, kept, ratio=ratio, lr_scale=lr_scale) if is_scaled else ""


def adapted(cfg: Mapping[str, Any], model: Transformer) -> Transformer:
    """Return the decoder with the trained parts that `adapt` adds beside its frozen weights; itself without `adapt`.

    The parts are drawn from the run's seed, and the state of the generator is left as it was.
    """
    if not cfg.get("adapt"):
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run_config(cfg).seed)
        return instantiate(cfg["adapt"])(model)


def build_callbacks(cfg: Mapping[str, Any], **supplied: Any) -> list[Any]:
    """Build the callbacks, finishing each factory with those of `supplied` that its signature asks for."""
    nodes = instantiate(cfg["callbacks"] or {})
    return [finish(node, **supplied) for node in nodes.values() if node is not None]


def build_evaluations(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Build the evaluations that were chosen, by name; none where there are none."""
    return {name: piece for name, piece in instantiate(cfg.get("eval") or {}).items() if piece is not None}


def build_averaging(cfg: Mapping[str, Any]) -> list[Any]:
    """Build the callback that averages weights, in a list; an empty one where none was chosen.

    Raises:
        ConfigError: a setting is out of its range, or the weights are sharded.
    """
    if not cfg.get("averaging"):
        return []
    if uses_deepspeed(cfg["trainer"]):
        raise ConfigError(
            "averaging: sharded weights are not averaged; use trainer=ddp, or eval.py average=5 afterwards"
        )
    return [instantiate(cfg["averaging"])]


def uses_deepspeed(trainer: Mapping[str, Any]) -> bool:
    """Return whether a trainer node runs DeepSpeed, by this project's factory or by Lightning's own strategy."""
    strategy = trainer.get("strategy")
    name = strategy.get("_target_", "").rpartition(".")[2] if isinstance(strategy, Mapping) else str(strategy)
    return isinstance(piece_at(trainer["_target_"]), TrainerChecker) or name.lower().startswith("deepspeed")


def build_loggers(cfg: Mapping[str, Any], **supplied: Any) -> list[Any]:
    """Build the loggers that were chosen; an empty list where there is none."""
    node = cfg.get("logger")
    if not node:
        return []
    nodes = [node] if "_target_" in node else [n for n in node.values() if n is not None]
    return [finish(instantiate(n), **supplied) for n in nodes]


def finish(piece: Any, **supplied: Any) -> Any:
    """Call a factory with those of `supplied` that its signature asks for; a finished piece is returned as it is."""
    if not isinstance(piece, partial):
        return piece
    asked = inspect.signature(piece.func).parameters
    return piece(**{name: value for name, value in supplied.items() if name in asked and name not in piece.keywords})


def build_trainer(cfg: Mapping[str, Any], sizes: Sizes, **arguments: Any) -> Any:
    """Build the Lightning trainer of the chosen node; `arguments` are those that the run decides."""
    node = dict(cfg["trainer"])
    node["precision"], node["accelerator"] = sizes.precision, sizes.accelerator  # Lightning's auto takes Apple's GPU
    if not isinstance(node.get("devices"), list):
        node["devices"], node["num_nodes"] = sizes.devices, sizes.num_nodes
    return instantiate(node, **arguments)
