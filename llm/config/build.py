"""Configuration to objects: build, save, load. The only file in llm/ that imports Hydra or OmegaConf."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from hydra.errors import InstantiationException
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import DictConfig, OmegaConf

from llm.batching import BatchPlan, BatchRamp, micro_batch_candidates, plan_batch, plan_ramp
from llm.errors import ConfigError, CrucibleError
from llm.launch import find_launch
from llm.precision import resolve_precision
from llm.scaling.derivation import family_of
from llm.scaling.half_life import half_life_note, keep_half_life
from llm.scaling.rates import Rates
from llm.signatures import is_allowed, locate
from llm.transformer import Transformer

GROUPS = (
    "model", "optimizer", "schedule", "scaling", "batch_schedule", "rates", "data", "tokenizer", "trainer", "logger",
    "callbacks", "loader", "eval", "averaging", "spikes",
)  # fmt: skip
CHECK_VOCABULARY = 64
"""Vocabulary of the throw-away model that `check` builds without storage."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run-level keys; everything else belongs to a group."""

    name: str
    seed: int
    max_steps: int | None
    max_tokens: int | None
    batch_tokens: int
    context_length: int
    micro_batch_size: int | Literal["auto"]
    val_every: int
    checkpoint_every: int
    on_nonfinite: Literal["raise", "skip", "tiger"]
    compile: bool | Literal["auto"]
    keep_half_life: bool
    resume: str | None
    init_from: str | None
    plan: bool


def piece_at(target: str) -> Any:
    """Return what a `_target_` names; None where it names nothing, or nothing that is allowed: `check` tells of it."""
    try:
        return locate(target) if is_allowed(target) else None
    except (ImportError, AttributeError):
        return None


def suited_rule(optimizer: str, rules: Mapping[str, str]) -> str:
    """Return the rule that `conf/scaling/auto.yaml` has for an optimizer's `_target_`, `none` where it has none."""
    piece = piece_at(optimizer)
    return rules.get((piece and family_of(piece)) or "", "none")


OmegaConf.register_new_resolver("suited_rule", suited_rule, replace=True)


def instantiate(node: Any, **arguments: Any) -> Any:
    """Build a node as Hydra does, with plain dicts and lists; a piece's own complaint comes out unwrapped."""
    try:
        return hydra_instantiate(node, _convert_="all", **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, CrucibleError):
            raise error.__cause__ from None
        raise


def to_plain(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration as plain, resolved dicts and lists."""
    if isinstance(cfg, DictConfig):
        return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]
    return dict(cfg)


def run_config(cfg: Mapping[str, Any]) -> RunConfig:
    """Return the run-level keys of a plain configuration that passed `check`."""
    return RunConfig(**{f.name: cfg[f.name] for f in fields(RunConfig)})


def build_meta_model(cfg: Mapping[str, Any], vocab_size: int = CHECK_VOCABULARY) -> Transformer:
    """Build the model without storage: its shapes and its rules, at no cost."""
    with torch.device("meta"):
        model = instantiate(cfg["model"])(vocab_size=vocab_size)
        build_rates(cfg).prepare(model)
        return model


def build_rates(cfg: Mapping[str, Any]) -> Rates:
    """Build what gives each tensor its rate."""
    return instantiate(cfg["rates"]) if cfg.get("rates") else Rates()


def accelerator(trainer: Mapping[str, Any]) -> str:
    """Return the kind of device that a trainer node will use: cpu or cuda.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    wanted = trainer.get("accelerator", "auto")
    available = torch.cuda.is_available()
    if wanted in ("gpu", "cuda") and not available:
        raise ConfigError(f"trainer.accelerator={wanted}: no CUDA device is visible; use trainer=cpu")
    return "cuda" if wanted in ("gpu", "cuda") or (wanted == "auto" and available) else "cpu"


def world_size(trainer: Mapping[str, Any]) -> int:
    """Return the number of processes that a trainer node will run.

    Raises:
        ConfigError: more devices than there are.
    """
    devices, nodes = topology(trainer)
    return devices * nodes


def topology(trainer: Mapping[str, Any]) -> tuple[int, int]:
    """Return devices a node, and nodes; what a launcher has started settles what the trainer node leaves open.

    Raises:
        ConfigError: more devices than there are, or another number than a launcher has started processes.
    """
    devices, launch = trainer.get("devices", 1), find_launch()
    visible = torch.cuda.device_count() if accelerator(trainer) == "cuda" else None
    count = len(devices) if isinstance(devices, list) else devices
    if count in ("auto", -1, "-1"):
        count = launch.devices if launch else visible or 1
    if visible is not None and int(count) > visible:
        raise ConfigError(f"trainer.devices={devices}: only {visible} CUDA devices are visible; ask for fewer")
    nodes = int(trainer.get("num_nodes", launch.num_nodes if launch else 1))
    if launch and int(count) * nodes != launch.world_size:
        raise ConfigError(
            f"trainer.devices={devices}: {launch.name} has started {launch.world_size} processes, {launch.devices} on "
            "each node; use trainer=ddp or trainer=deepspeed, and leave trainer.devices and trainer.num_nodes out"
        )
    return int(count), nodes


def batch_ramp(cfg: Mapping[str, Any]) -> BatchRamp:
    """Return the tokens of each update of the run."""
    node = cfg.get("batch_schedule")
    changes = instantiate(node)(batch_tokens=cfg["batch_tokens"]) if node else {0: cfg["batch_tokens"]}
    return plan_ramp(changes, max_steps=cfg["max_steps"], max_tokens=cfg["max_tokens"])


def planned_steps(cfg: Mapping[str, Any]) -> int:
    """Return the optimizer updates of the run."""
    return batch_ramp(cfg).total_steps


def least_micro_batches(cfg: Mapping[str, Any]) -> tuple[int, str]:
    """Return how many micro-batches an update must have over all devices, and the callback that asks for them."""
    nodes = {key: node for key, node in (cfg["callbacks"] or {}).items() if isinstance(node, Mapping)}
    asked = {key: getattr(piece_at(str(node.get("_target_"))), "least_micro_batches", 1) for key, node in nodes.items()}
    return max(((count, key) for key, count in asked.items()), default=(1, ""))


def micro_batch_sizes(cfg: Mapping[str, Any]) -> list[int]:
    """Return what `micro_batch_size=auto` may be, largest first."""
    return micro_batch_candidates(
        batch_tokens=cfg["batch_tokens"],
        context_length=cfg["context_length"],
        world_size=world_size(cfg["trainer"]),
        least=least_micro_batches(cfg)[0],
    )


def batch_plan(cfg: Mapping[str, Any]) -> BatchPlan:
    """Return the plan of an update; `micro_batch_size=auto` is taken as its largest candidate."""
    sizes = {key: cfg[key] for key in ("batch_tokens", "context_length")}
    sizes["world_size"], micro = world_size(cfg["trainer"]), cfg["micro_batch_size"]
    return plan_batch(**sizes, micro_batch_size=micro_batch_sizes(cfg)[0] if micro == "auto" else micro)


def build_tokenizer(cfg: Mapping[str, Any]) -> Any:
    """Build the tokenizer of the chosen node; one that is trained on the corpus has no ids yet."""
    return instantiate(cfg["tokenizer"])


def build_data(cfg: Mapping[str, Any], micro_batch_size: int) -> Any:
    """Build the data module: a source, a tokenizer, and the loader that turns them into windows."""
    run = run_config(cfg)
    return instantiate(cfg["loader"])(
        source=instantiate(cfg["data"]),
        tokenizer=build_tokenizer(cfg),
        context_length=run.context_length,
        batch_tokens=run.batch_tokens,
        micro_batch_size=micro_batch_size,
        seed=run.seed,
        ramp=batch_ramp(cfg),
    )


def build_model(cfg: Mapping[str, Any], vocab_size: int) -> Transformer:
    """Build the model with weights drawn from the run's seed."""
    torch.manual_seed(run_config(cfg).seed)
    model = instantiate(cfg["model"])(vocab_size=vocab_size)
    build_rates(cfg).prepare(model)
    return model


def module_factories(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the optimizer, schedule and scaling factories with the rates that the optimizer's node states."""
    optimizer = cfg["optimizer"]
    return {
        "optimizer": instantiate(optimizer),
        "lr": float(optimizer["lr"]),
        "weight_decay": float(optimizer["weight_decay"]),
        "schedule": instantiate(cfg["schedule"]),
        "scaling": instantiate(cfg["scaling"]),
        "ramp": batch_ramp(cfg),
        "rates": build_rates(cfg),
        "spikes": instantiate(cfg["spikes"]) if cfg.get("spikes") else None,
    }


def needs_probe(cfg: Mapping[str, Any]) -> bool:
    """Whether the run's rates wait for a noise scale: one that is to be measured, and a batch other than the base."""
    node = cfg["scaling"]
    sizes = {batch_tokens for _, _, batch_tokens in batch_ramp(cfg).stages}
    return node.get("noise_scale") == "measured" and sizes != {node.get("base_batch_tokens")}


def retuned_optimizer(cfg: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the optimizer's node for the batch of the run, and what became of its half-lives in tokens."""
    node, base = dict(cfg["optimizer"]), cfg["scaling"].get("base_batch_tokens")
    ratio = cfg["batch_tokens"] / base
    lr_scale = instantiate(cfg["scaling"])(cfg["batch_tokens"])
    kept = keep_half_life(node, ratio=ratio, lr_scale=lr_scale) if cfg.get("keep_half_life") else node
    is_scaled = cfg["scaling"]["_target_"] != "llm.scaling.rules.none" or kept != node
    return kept, half_life_note(node, kept, ratio=ratio, lr_scale=lr_scale) if is_scaled else ""


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
        ConfigError: a setting out of its range, or weights that are sharded.
    """
    if not cfg.get("averaging"):
        return []
    if "deepspeed" in str(cfg["trainer"].get("strategy")).lower() or "llm.strategy" in str(cfg["trainer"]):
        raise ConfigError(
            "averaging: sharded weights are not averaged; use trainer=ddp, or eval.py average=5 afterwards"
        )
    return [instantiate(cfg["averaging"])]


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


def build_trainer(cfg: Mapping[str, Any], **arguments: Any) -> Any:
    """Build the Lightning trainer of the chosen node; `arguments` are what the run decides."""
    node = dict(cfg["trainer"])
    node["precision"] = resolve_precision(node["precision"], accelerator=accelerator(node))
    if not isinstance(node.get("devices"), list):
        node["devices"], node["num_nodes"] = topology(node)
    return instantiate(node, **arguments)


def save(cfg: Mapping[str, Any], path: Path) -> None:
    """Write a plain configuration as YAML."""
    path.write_text(yaml.safe_dump(dict(cfg), sort_keys=False, allow_unicode=True))


def load(path: Path) -> dict[str, Any]:
    """Read a configuration that `save` wrote.

    Raises:
        ConfigError: a file that is missing or is no mapping.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: not found; name a run folder, which holds a config.yaml")
    cfg = yaml.safe_load(path.read_text())
    if not isinstance(cfg, dict):
        raise ConfigError(f"{path}: not a configuration; name a run folder that train.py made")
    return cfg
