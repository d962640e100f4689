"""The validation of a LightningModule: loss, bits per byte and perplexity over the validation set of all ranks."""

import math
from collections.abc import Callable
from typing import Literal

import lightning as L
import torch
import torch.distributed as distributed
from jaxtyping import Float
from torch import Tensor

from llm.contracts import Batch, Objective, TokenNLL
from llm.evals.loss_metrics import validation_metrics
from llm.model.transformer import Transformer, TransformerOutput
from llm.ops.loss import loss_and_byte_sums
from llm.ops.noise import KeyedNoise


class ValidatedModule(L.LightningModule):
    """A LightningModule that validates its decoder; a subclass adds the training step."""

    model: Transformer
    objective: Objective
    run_model: Callable[..., TransformerOutput]
    """The decoder's forward, which may be compiled."""
    token_bytes: Tensor
    """Number of bytes of each token id, which bits per byte needs."""

    def on_validation_epoch_start(self) -> None:
        """Reset the sums of loss, tokens and bytes, and the number of windows."""
        self._validation = torch.zeros(8, dtype=torch.float64, device=self.device)
        self._validated = 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up loss in nats, labels and the bytes that they stand for."""
        own = self._validated + torch.arange(len(batch["input_ids"]), device=self.device)
        self._validated += len(own)
        # ranks read the validation windows in turns
        noise = KeyedNoise(0, 0, own * self.trainer.world_size + self.trainer.global_rank)
        found = self.objective.validation_nll(self.model, self.run_model, batch, noise)
        sums = loss_and_byte_sums(found.nats, found.labels, self.token_bytes)
        self._validation += torch.cat([sums, window_moments(found)]).to(self._validation)

    def on_validation_epoch_end(self) -> None:
        """Log loss, bits per byte and perplexity over the whole validation set of all ranks."""
        loss, tokens, num_bytes, *moments = self.reduced(self._validation, "sum").tolist()
        figures = validation_metrics(loss, tokens, num_bytes)
        if self.objective.is_bound:
            figures["val/loss_standard_error"] = standard_error_of(loss, tokens, *moments)
        for name, value in figures.items():
            # the recorder hands them to the loggers, with tokens_seen beside them
            self.log(name, value, logger=False, sync_dist=self.trainer.world_size > 1)

    def reduced(self, value: Tensor, reduce_op: Literal["sum", "mean", "max"]) -> Tensor:
        """Return the sum, the mean or the largest value of a tensor over the ranks."""
        if self.trainer.world_size == 1:
            return value
        total = value.detach().clone()
        operation = distributed.ReduceOp.MAX if reduce_op == "max" else distributed.ReduceOp.SUM
        distributed.all_reduce(total, op=operation)  # Lightning's own reduction waits at a barrier first
        return total / self.trainer.world_size if reduce_op == "mean" else total


def window_moments(found: TokenNLL) -> Float[Tensor, " 5"]:
    """Return the number of windows, and the sums over windows of s², s n, n² and n, with s nats of n labels each."""
    nats, labels = found.nats.double().sum(1), found.scored.double().sum(1)
    count = torch.ones_like(labels).sum()
    return torch.stack([count, nats.square().sum(), (nats * labels).sum(), labels.square().sum(), labels.sum()])


def standard_error_of(
    loss: float, tokens: float, windows: float, squares: float, products: float, counts: float, labels: float
) -> float:
    """Return the standard error of loss / tokens over windows, from the sums of `window_moments`."""
    mean = loss / max(tokens, 1.0)
    spread = max(0.0, squares - 2 * mean * products + mean**2 * counts)
    return math.sqrt(spread / max(windows - 1, 1.0) * windows) / max(labels, 1.0)
