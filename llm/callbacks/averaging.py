"""Averages of the weights along a training run, which validation, samples and checkpoints then use."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from llm.errors import ConfigError


class RunningAverage(WeightAveraging):
    """The base of averages of the weights; validation and checkpoints use the raw weights until the first average.

    Training continues with the raw weights, which a checkpoint stores as well. Load-balancing biases and codebooks are
    averages already and are not averaged again.

    Attributes:
        first_average: the update after which the average first exists.
    """

    first_average: int

    def equivalent_decay(self, total_steps: int) -> str:
        """Describe the decay of the learning rate that the average at the end of a run corresponds to.

        A weighted mean of the iterates x_t is the last iterate of a run in which update t has its rate multiplied by
        the share of the weights that lie behind it. This holds exactly for given updates; those of a real run depend
        on the rate.
        """
        raise NotImplementedError

    @torch.no_grad()
    def _follow_raw_weights(self, pl_module: Any) -> None:
        """Copy the raw weights into the average while nothing has been averaged."""
        if self._average_model is None or self._latest_update_step:
            return
        for mine, raw in zip(self._average_model.module.parameters(), pl_module.parameters(), strict=True):
            mine.copy_(raw)
        for mine, raw in zip(self._average_model.module.buffers(), pl_module.buffers(), strict=True):
            mine.copy_(raw)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Validate the average."""
        self._follow_raw_weights(pl_module)
        super().on_validation_epoch_start(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save the average as the weights, and the raw weights as a further entry."""
        self._follow_raw_weights(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Leave the average in the module."""
        self._follow_raw_weights(pl_module)
        super().on_train_end(trainer, pl_module)


class EveryUpdateAverage(RunningAverage):
    """The base of averages that every update enters: w̄ ← w̄ + share · (w − w̄).

    The average starts as a copy of the first averaged weights.

    Args:
        start: number of updates before the first that enters the average; below the updates of the run.

    Raises:
        ConfigError: start is below 0.
    """

    def __init__(self, *, start: int) -> None:
        if start < 0:
            raise ConfigError(f"averaging.start={start}: must be at least 0")
        super().__init__(use_buffers=False, multi_avg_fn=self._mix)
        self.start, self.first_average = start, start + 1
        self._num_averaged = 0

    def share_of_next(self, num_averaged: int) -> float:
        """Return the share of the new weights in the average after `num_averaged` updates have entered it."""
        raise NotImplementedError

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Return whether an update enters the average."""
        return step_idx is not None and step_idx >= self.start

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *arguments: Any) -> None:
        """Average the weights after an update, and count it."""
        before = self._latest_update_step
        super().on_train_batch_end(trainer, pl_module, *arguments)
        self._num_averaged += self._latest_update_step != before

    @torch.no_grad()
    def _mix(self, averages: Any, weights: Any, _: Any) -> None:
        share = self.share_of_next(self._num_averaged)
        torch._foreach_lerp_(averages, weights, share)  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Any]:
        """Return the count of averaged updates with Lightning's own state."""
        return super().state_dict() | {"num_averaged": self._num_averaged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; a checkpoint of version 0.1 has no count, which follows from its last update."""
        super().load_state_dict(state_dict)
        self._num_averaged = state_dict.get("num_averaged", max(0, self._latest_update_step - self.start))


class EMA(EveryUpdateAverage):
    """An exponential moving average of the weights, updated after every optimizer update.

        w̄ ← d · w̄ + (1 − d) · w,   d = min(decay, (1 + n) / (10 + n)),   n = updates averaged before

    The lower decay at the start keeps the average of a short run from being dominated by the weights that the run
    started with. For given updates, the average is the last iterate of a run whose rate has the factor
    1 − decay^(T − t) at update t of T.

    Args:
        decay: decay rate, in [0, 1); the average reaches back about 1 / (1 − decay) updates.
        start: number of updates before the first that enters the average; below the updates of the run.

    Raises:
        ConfigError: a decay outside [0, 1), or a start below 0.

    Source: Polyak and Juditsky, 1992; Morales-Brotons et al., arXiv:2411.18704, eq. 1. The lower decay at the start is
    that of TensorFlow's ExponentialMovingAverage. Averages as decays: Su, kexue.fm/archives/11804.
    """

    def __init__(self, *, decay: float, start: int) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"averaging.decay={decay}: must lie in [0, 1); 0.999 reaches back 1000 updates")
        super().__init__(start=start)
        self.decay = decay

    def share_of_next(self, num_averaged: int) -> float:
        return 1 - min(self.decay, (1 + num_averaged) / (10 + num_averaged))

    def equivalent_decay(self, total_steps: int) -> str:
        span = min(1 / (1 - self.decay), total_steps - self.start)
        return f"a rate that falls as 1 - {self.decay:g}^(updates left), over about the last {span:.0f} updates"


class WindowAverage(EveryUpdateAverage):
    """The mean of the weights after each update from `start` on.

        w̄ ← w̄ + (w − w̄) / n,   n = updates in the average

    One fp32 copy of the weights replaces the snapshots of `LastAverage`, and no update is left out. For given updates,
    the average is the last iterate of a run whose rate falls linearly to zero from `start` on:

        Σ_t x_t / D = x_0 − Σ_t min(1, (T − t) / D) · lr · u_t,   D = T − start

    Args:
        start: number of updates before the first that enters the average; below the updates of the run. Weights still
            travel over a long window, so an average over more than about 15 % of a run at a constant rate lags behind.

    Raises:
        ConfigError: start is below 0.

    Source: Su, kexue.fm/archives/11804; stochastic weight averaging of Izmailov et al., arXiv:1803.05407.
    """

    def share_of_next(self, num_averaged: int) -> float:
        return 1 / (num_averaged + 1)

    def equivalent_decay(self, total_steps: int) -> str:
        return f"a rate that falls linearly to zero over the last {total_steps - self.start} updates"


class LastAverage(RunningAverage):
    """A mean of the last few snapshots of the weights, which are taken at a fixed interval of updates.

    Args:
        count: number of snapshots in the average, at least 2; each takes the memory of the weights.
        every: updates between snapshots, at least 1 and at most the updates of the run.

    Raises:
        ConfigError: a setting below its least value.

    For given updates, the average is the last iterate of a run whose rate falls to zero in `count` equal steps.

    Source: Kaddour, arXiv:2209.14981, section 2; Sanyal et al., arXiv:2306.03241, algorithm 1.
    """

    def __init__(self, *, count: int, every: int) -> None:
        if count < 2:
            raise ConfigError(f"averaging.count={count}: must be at least 2, or there is nothing to average; try 5")
        if every < 1:
            raise ConfigError(f"averaging.every={every}: must be at least 1 update; try 100")
        super().__init__(use_buffers=False)
        self.count, self.every, self.first_average = count, every, every
        self._snapshots: list[list[Tensor]] = []

    def equivalent_decay(self, total_steps: int) -> str:
        last = total_steps // self.every * self.every
        span = min(self.count - 1, last // self.every - 1) * self.every
        return f"a rate that falls in {span // self.every + 1} steps to zero over updates {last - span} to {last}"

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Return whether a snapshot is due."""
        return step_idx is not None and (step_idx + 1) % self.every == 0

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *arguments: Any) -> None:
        """Take a snapshot when it is due, and average the snapshots."""
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
        """Return the snapshots with Lightning's own state."""
        return super().state_dict() | {"snapshots": self._snapshots}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the snapshots."""
        super().load_state_dict(state_dict)
        self._snapshots = state_dict["snapshots"]
