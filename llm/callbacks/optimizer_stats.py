"""Measures the updates of the optimizer per kind of parameter, so that a rule that does not act is visible."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from llm.contracts import HasTraits, ShardingStrategy
from llm.errors import ConfigError
from llm.optim.receipt import unwrap
from llm.optim.stats import Move, kind_stats, moves_to_come, sampled_orthogonality


class OptimizerStats(Callback):
    """A callback that logs, per kind, the RMS of the update and of the weights, their ratio, and the gradient's norm.

    All tensors of a kind are combined, also where `rates` gives them different rates. For Muon's matrices it also logs
    the distance of some updates from orthogonal matrices (`llm.optim.stats.orthogonality_error`). For Tiger it logs how
    often tensors were shrunk because a gradient was not finite. It measures every `every`-th update, from copies of the
    parameters that are made before the update and take 4 bytes per parameter.

    Args:
        every: updates between measurements, at least 1.
        orthogonality_samples: number of matrices whose orthogonality is measured, at least 1.
    """

    def __init__(self, *, every: int, orthogonality_samples: int) -> None:
        for name, value in (("every", every), ("orthogonality_samples", orthogonality_samples)):
            if value < 1:
                raise ConfigError(f"callbacks.optimizer_stats.{name}={value}: must be at least 1; try 4")
        self.every, self.orthogonality_samples = every, orthogonality_samples
        self._step = -1
        self._moves: dict[str, list[Move]] = {}
        self._norms: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuse strategies under which no rank has whole tensors, because their updates cannot be measured."""
        if isinstance(trainer.strategy, ShardingStrategy) and trainer.strategy.layouts:
            raise ConfigError(
                "callbacks.optimizer_stats: needs whole tensors, and this run shards them; use trainer.stage=0 "
                "or trainer=ddp, or remove the callback"
            )

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Copy the parameters and measure the gradients before clipping, if this update is measured."""
        step = trainer.global_step + 1
        if step % self.every:
            return
        self._step, self._norms = step, {}
        self._moves = moves_to_come(unwrap(optimizer).param_groups)
        for kind, moves in self._moves.items():
            gradients = [move.parameter.grad for move in moves if move.parameter.grad is not None]
            if gradients:
                self._norms[kind] = torch.nn.utils.get_total_norm(gradients)

    @torch.no_grad()
    def step_metrics(self, trainer: L.Trainer, pl_module: Any) -> dict[str, Tensor | float]:
        """Return the figures of this update, if it was measured."""
        by_kind, self._moves = self._moves, {}
        if self._step != trainer.global_step or not by_kind:
            return {}
        optimizer = unwrap(trainer.optimizers[0])
        metrics: dict[str, Tensor | float] = {f"optimizer/grad_norm/{kind}": n for kind, n in self._norms.items()}
        for kind, moves in by_kind.items():
            metrics |= {f"optimizer/{name}/{kind}": value for name, value in kind_stats(moves).items()}
            if kind == "matrix" and isinstance(optimizer, HasTraits) and optimizer.traits.orthogonalizes:
                error = sampled_orthogonality(moves, samples=self.orthogonality_samples)
                metrics["optimizer/orthogonality_error/matrix"] = error
        shrunk = sum(state.get("shrunk", 0) for state in optimizer.state.values())
        return metrics | ({"optimizer/shrunk": float(shrunk)} if shrunk else {})
