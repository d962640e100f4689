"""Measures the gradient noise scale during training, from the gradients of micro-batches and ranks."""

import logging
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from llm.contracts import ShardingStrategy
from llm.errors import ConfigError
from llm.optim.param_groups import parameter_kinds
from llm.scaling.noise_estimate import SmoothedNoiseScale, two_batch_estimate
from llm.scaling.trade import tokens_over_minimum, updates_over_minimum

log = logging.getLogger(__name__)

ALL = "all"


class NoiseScale(Callback):
    """A callback that logs the gradient noise scale, B_noise = tr Σ / |g|², in tokens.

    It logs `noise_scale` for all parameters and for instance `noise_scale/matrix` per kind. It compares the squared
    norm of the gradient of each micro-batch on each rank, before accumulation and reduction, with that of the update's
    gradient before clipping. On every `every`-th update it reads the gradients once per micro-batch, without extra
    memory. The unit is valid for batches of whole windows of context_length, because the tokens of one window are not
    independent.

    Args:
        every: updates between measurements, at least 1.
        decay: decay rate of the averages over measurements, in [0, 1).
        accumulation: micro-batches per update on each device.
        world_size: number of devices.

    Raises:
        ConfigError: a setting is out of range, or an update has one micro-batch on one device, so that nothing can be
            compared.
    """

    least_micro_batches = 2
    """Least number of micro-batches per update over all devices; `micro_batch_size=auto` respects it."""

    def __init__(self, *, every: int, decay: float, accumulation: int, world_size: int) -> None:
        if every < 1:
            raise ConfigError(f"callbacks.noise_scale.every={every}: must be at least 1; try 1")
        if accumulation * world_size < self.least_micro_batches:
            raise ConfigError(
                "callbacks.noise_scale: an update has one micro-batch on one device, and the noise scale compares at "
                "least two; set micro_batch_size to half of its value, or less"
            )
        self.every, self.batches = every, accumulation * world_size
        self.accumulation = accumulation
        self.smoothed = SmoothedNoiseScale(decay=decay)
        self._kinds: dict[str, list[Tensor]] = {}
        self._small: dict[str, list[Tensor]] = {}
        self._is_due, self._step, self._latest = False, 0, -1
        self._hooks: list[Any] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Register a hook on every parameter's gradient."""
        named = dict(pl_module.model.named_parameters())
        for name, kind in parameter_kinds(pl_module.model).items():
            self._kinds.setdefault(kind, []).append(named[name])
            self._hooks.append(named[name].register_hook(partial(self._take, kind)))
        self._prepare(trainer)

    def _prepare(self, trainer: L.Trainer) -> None:
        self._step = trainer.global_step
        self._small = {kind: [] for kind in self._kinds}
        self._is_due = (trainer.global_step + 1) % self.every == 0

    def _take(self, kind: str, gradient: Tensor) -> None:
        """Add one gradient's squared norm. The backward pass calls this."""
        if self._is_due:
            self._small[kind].append(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Measure when all gradients of the update exist."""
        if not self._is_due:
            return
        big = {kind: self._squares_of_update(trainer, kind) for kind in self._kinds}
        small = {kind: torch.stack(norms).square().sum() for kind, norms in self._small.items()}
        totals = torch.stack([*small.values(), *big.values()])
        if trainer.world_size > 1:
            totals[: len(small)] = torch.as_tensor(trainer.strategy.reduce(totals[: len(small)], reduce_op="mean"))
        numbers = totals.tolist()
        # each micro-batch's loss is divided by their number on the device; its gradient is larger by this factor
        smalls = dict(zip(small, (n * self.accumulation for n in numbers[: len(small)]), strict=True))
        bigs = dict(zip(big, numbers[len(small) :], strict=True))
        tokens = pl_module.batch_tokens_at(trainer.global_step)
        for name in (*self._kinds, ALL):
            pair = (sum(smalls.values()), sum(bigs.values())) if name == ALL else (smalls[name], bigs[name])
            signal, trace = two_batch_estimate(*pair, small=tokens / self.batches, big=tokens)
            self.smoothed.update(name, signal=signal, trace=trace)
        self._latest = trainer.global_step + 1

    def _squares_of_update(self, trainer: L.Trainer, kind: str) -> Tensor:
        """Return |G|² of one kind over the whole update; a strategy that shards gradients computes it."""
        if isinstance(trainer.strategy, ShardingStrategy):
            return trainer.strategy.squared_gradients(self._kinds[kind])
        gradients = [p.grad for p in self._kinds[kind] if p.grad is not None]
        if not gradients:
            raise ConfigError(
                "callbacks.noise_scale: no gradient exists before the update; set "
                "optimizer.accumulate=buffer, or a trainer that keeps gradients whole"
            )
        return torch.nn.utils.get_total_norm(gradients).float().square()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Reset the sums for the next update."""
        if trainer.global_step != self._step:
            self._prepare(trainer)

    def step_metrics(self, trainer: L.Trainer, pl_module: Any) -> dict[str, float]:
        """Return the noise scales after a measured update."""
        if self._latest != trainer.global_step:
            return {}
        named = {
            ("noise_scale" if n == ALL else f"noise_scale/{n}"): self.smoothed.value(n) for n in (*self._kinds, ALL)
        }
        return {name: value for name, value in named.items() if value is not None}

    def final_figures(self, trainer: L.Trainer, pl_module: Any) -> dict[str, float | None]:
        """Return the last noise scale, and the cost of the batch in updates and in tokens relative to the fewest."""
        scale = self.smoothed.value(ALL)
        if scale is None:
            return {"noise_scale": None}
        sizes = {"batch_tokens": pl_module.batch_tokens, "noise_scale": scale}
        return {
            "noise_scale": scale,
            "updates_over_minimum": updates_over_minimum(**sizes),
            "tokens_over_minimum": tokens_over_minimum(**sizes),
        }

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Remove the hooks."""
        self._unhook()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Remove the hooks."""
        self._unhook()

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, which a resumed run restores."""
        return {"averages": self.smoothed.averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the averages of a checkpoint."""
        self.smoothed.averages = {name: list(pair) for name, pair in state_dict["averages"].items()}
