"""The sizes of a run, computed once from its configuration: device, processes, batch plan, ramp and steps."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from llm.config.pieces import instantiate, piece_at, piece_signature
from llm.contracts import MicroBatchComparer
from llm.distributed.launch import find_launch
from llm.errors import ConfigError
from llm.ops.precision import resolve_precision
from llm.scaling.batching import BatchPlan, BatchRamp, micro_batch_candidates, plan_batch, plan_ramp


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The values that follow from the configuration by arithmetic, computed once and passed down.

    Args:
        accelerator: kind of device, cpu or cuda.
        precision: Lightning's name of the arithmetic, with `auto` resolved.
        devices: processes per node, one for each device.
        num_nodes: number of nodes.
        plan: how one update becomes micro-batches.
        ramp: tokens of each update of the run.
        micro_batch_sizes: candidates of `micro_batch_size=auto`, largest first.
        needs_probe: whether the learning rate depends on a noise scale that is still to be measured.
    """

    accelerator: str
    precision: str
    devices: int
    num_nodes: int
    plan: BatchPlan
    ramp: BatchRamp
    micro_batch_sizes: tuple[int, ...]
    needs_probe: bool

    @property
    def world_size(self) -> int:
        """Number of processes of the run."""
        return self.devices * self.num_nodes

    @property
    def total_steps(self) -> int:
        """Number of optimizer updates of the run."""
        return self.ramp.total_steps

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        launch = find_launch()
        if launch is not None and self.accelerator == "cuda":
            return torch.device("cuda", launch.local_rank)
        return torch.device(self.accelerator)

    def autocast(self) -> torch.autocast:
        """Return the context in which a forward pass runs at the precision of the run, outside Lightning."""
        return torch.autocast(self.accelerator, torch.bfloat16, enabled=self.precision.endswith("mixed"))

    def with_micro_batch_size(self, micro_batch_size: int) -> "Sizes":
        """Return these sizes with the micro-batch size that was found."""
        return replace(self, plan=replace(self.plan, micro_batch_size=micro_batch_size))


def sizes_of(cfg: Mapping[str, Any]) -> Sizes:
    """Return the sizes of a plain configuration; `micro_batch_size=auto` counts as its largest candidate.

    Raises:
        ConfigError: sizes that do not fit one another or this machine.
    """
    kind = accelerator(cfg["trainer"])
    devices, num_nodes = topology(cfg["trainer"])
    ramp = batch_ramp(cfg)
    return Sizes(
        accelerator=kind,
        precision=resolve_precision(cfg["trainer"]["precision"], accelerator=kind),
        devices=devices,
        num_nodes=num_nodes,
        plan=batch_plan(cfg),
        ramp=ramp,
        micro_batch_sizes=tuple(micro_batch_sizes(cfg)),
        needs_probe=needs_probe(cfg, ramp),
    )


def accelerator(trainer: Mapping[str, Any]) -> str:
    """Return the kind of device that a trainer node will use: cpu or cuda.

    Raises:
        ConfigError: a GPU is asked for and there is none, or the kind is not supported.
    """
    wanted = trainer.get("accelerator", "auto")
    available = torch.cuda.is_available()
    if wanted not in ("auto", "cpu", "gpu", "cuda"):
        raise ConfigError(
            f"trainer.accelerator={wanted}: is not supported; use auto, cpu or cuda (Apple's GPUs are not used)"
        )
    if wanted in ("gpu", "cuda") and not available:
        raise ConfigError(f"trainer.accelerator={wanted}: no CUDA device is visible; use trainer=cpu")
    return "cuda" if wanted in ("gpu", "cuda") or (wanted == "auto" and available) else "cpu"


def topology(trainer: Mapping[str, Any]) -> tuple[int, int]:
    """Return the devices per node and the number of nodes.

    A value that the trainer node does not set follows from the launcher that started this process.

    Raises:
        ConfigError: more devices than are visible, or another number than a launcher has started processes for.
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
            "each node; use trainer=ddp or trainer=deepspeed, and remove trainer.devices and trainer.num_nodes"
        )
    return int(count), nodes


def world_size(trainer: Mapping[str, Any]) -> int:
    """Return the number of processes that a trainer node will run; see `topology`."""
    devices, nodes = topology(trainer)
    return devices * nodes


def batch_ramp(cfg: Mapping[str, Any]) -> BatchRamp:
    """Return the tokens of each update of the run."""
    node = cfg.get("batch_schedule")
    changes = instantiate(node)(batch_tokens=cfg["batch_tokens"]) if node else {0: cfg["batch_tokens"]}
    return plan_ramp(changes, max_steps=cfg["max_steps"], max_tokens=cfg["max_tokens"])


def least_micro_batches(cfg: Mapping[str, Any]) -> tuple[int, str]:
    """Return how many micro-batches an update needs over all devices, and the name of the callback that needs them."""
    least = (1, "")
    for name, node in (cfg["callbacks"] or {}).items():
        target = str(node.get("_target_")) if isinstance(node, Mapping) else ""
        signature = piece_signature(target)  # most callbacks compare none, and importing them takes seconds
        piece = piece_at(target) if signature and "least_micro_batches" in signature.members else None
        if isinstance(piece, MicroBatchComparer):
            least = max(least, (piece.least_micro_batches, name))
    return least


def micro_batch_sizes(cfg: Mapping[str, Any]) -> list[int]:
    """Return the candidates of `micro_batch_size=auto`, largest first."""
    return micro_batch_candidates(
        batch_tokens=cfg["batch_tokens"],
        context_length=cfg["context_length"],
        world_size=world_size(cfg["trainer"]),
        least=least_micro_batches(cfg)[0],
    )


def batch_plan(cfg: Mapping[str, Any]) -> BatchPlan:
    """Return the plan of an update; `micro_batch_size=auto` counts as its largest candidate."""
    micro = cfg["micro_batch_size"]
    return plan_batch(
        batch_tokens=cfg["batch_tokens"],
        context_length=cfg["context_length"],
        world_size=world_size(cfg["trainer"]),
        micro_batch_size=micro_batch_sizes(cfg)[0] if micro == "auto" else micro,
    )


def needs_probe(cfg: Mapping[str, Any], ramp: BatchRamp) -> bool:
    """Return whether a noise scale must be measured, and an update has another size than the base batch."""
    node = cfg["scaling"]
    sizes = {batch_tokens for _, _, batch_tokens in ramp.stages}
    return node.get("noise_scale") == "measured" and sizes != {node.get("base_batch_tokens")}
