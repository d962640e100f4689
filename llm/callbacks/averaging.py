"""Averages of the weights along a training run, which validation, samples and checkpoints then use."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import Tensor

from llm.errors import ConfigError


class EMA(EMAWeightAveraging):
    """Keeps an exponential moving average of the weights, w̄ ← decay · w̄ + (1 − decay) · w, after every update.

    Validation and checkpoints hold the average; training goes on with the weights themselves, which a checkpoint keeps
    as well. Balancing biases and codebooks, which are averages already, are not averaged again.

    Args:
        decay: in [0, 1); the average reaches back about 1 / (1 − decay) updates.
        start: updates before the first that enters the average.

    Raises:
        ConfigError: a decay outside [0, 1), or a start below 0.

    Source: Polyak and Juditsky, 1992; Morales-Brotons et al., arXiv:2411.18704, eq. 1.
    """

    def __init__(self, *, decay: float, start: int) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"averaging.decay={decay}: must lie in [0, 1); 0.999 reaches back 1000 updates")
        if start < 0:
            raise ConfigError(f"averaging.start={start}: must be at least 0")
        super().__init__(use_buffers=False, decay=decay, update_starting_at_step=start)


class LastAverage(WeightAveraging):
    """Averages the weights of the last few snapshots, taken every so many updates.

    Validation and checkpoints hold the average; until there is a snapshot, the weights as they began.

    Args:
        count: snapshots in the average, at least 2; each takes the memory of the weights.
        every: updates between snapshots, at least 1.

    Raises:
        ConfigError: a setting below its least.

    Source: Kaddour, arXiv:2209.14981, section 2; Sanyal et al., arXiv:2306.03241, algorithm 1.
    """

    def __init__(self, *, count: int, every: int) -> None:
        if count < 2:
            raise ConfigError(f"averaging.count={count}: must be at least 2, or there is nothing to average; try 5")
        if every < 1:
            raise ConfigError(f"averaging.every={every}: must be at least 1 update; try 100")
        super().__init__(use_buffers=False)
        self.count, self.every = count, every
        self._snapshots: list[list[Tensor]] = []

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Every so many updates."""
        return step_idx is not None and (step_idx + 1) % self.every == 0

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *arguments: Any) -> None:
        """Take a snapshot when it is due, and average those there are."""
        before = self._latest_update_step
        super().on_train_batch_end(trainer, pl_module, *arguments)
        if self._latest_update_step == before:
            return
        self._snapshots.append([parameter.detach().clone() for parameter in pl_module.parameters()])
        del self._snapshots[: -self.count]
        assert self._average_model is not None
        for average, *snapshots in zip(self._average_model.module.parameters(), *self._snapshots, strict=True):
            average.copy_(torch.stack(snapshots).mean(0))

    def state_dict(self) -> dict[str, Any]:
        """Return the snapshots."""
        return super().state_dict() | {"snapshots": self._snapshots}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the snapshots."""
        super().load_state_dict(state_dict)
        self._snapshots = state_dict["snapshots"]
