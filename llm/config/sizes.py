"""The sizes of a run, derived once from its configuration: processes, batch plan, ramp and steps."""

from collections.abc import Mapping
from typing import Any

import torch

from llm.config.pieces import instantiate, piece_at
from llm.distributed.launch import find_launch
from llm.errors import ConfigError
from llm.scaling.batching import BatchPlan, BatchRamp, micro_batch_candidates, plan_batch, plan_ramp


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


def needs_probe(cfg: Mapping[str, Any]) -> bool:
    """Whether the run's rates wait for a noise scale: one that is to be measured, and a batch other than the base."""
    node = cfg["scaling"]
    sizes = {batch_tokens for _, _, batch_tokens in batch_ramp(cfg).stages}
    return node.get("noise_scale") == "measured" and sizes != {node.get("base_batch_tokens")}
