"""The validation of a LightningModule: loss, bits per byte and perplexity over the validation set of all ranks."""

from collections.abc import Callable
from typing import Literal

import lightning as L
import torch
import torch.distributed as distributed
from jaxtyping import Float
from torch import Tensor

from llm.contracts import Batch, Objective
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
        self._validation = torch.zeros(3, dtype=torch.float64, device=self.device)
        self._validated = 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up loss in nats, labels and the bytes that they stand for."""
        own = self._validated + torch.arange(len(batch["input_ids"]), device=self.device)
        self._validated += len(own)
        # ranks read the validation windows in turns
        noise = KeyedNoise(0, 0, own * self.trainer.world_size + self.trainer.global_rank)
        self._validation += self.loss_sums(batch, noise).to(self._validation)

    def loss_sums(self, batch: Batch, noise: KeyedNoise) -> Float[Tensor, " 3"]:
        """Return the summed loss in nats, the number of labels and the bytes that they stand for, in fp64."""
        found = self.objective.validation_nll(self.model, self.run_model, batch, noise)
        return loss_and_byte_sums(found.nats, found.labels, self.token_bytes)

    def on_validation_epoch_end(self) -> None:
        """Log loss, bits per byte and perplexity over the whole validation set of all ranks."""
        sums = self.reduced(self._validation, "sum")
        for name, value in validation_metrics(*sums.tolist()).items():
            # the recorder hands them to the loggers, with tokens_seen beside them
            self.log(name, value, logger=False, sync_dist=self.trainer.world_size > 1)

    def reduced(self, value: Tensor, reduce_op: Literal["sum", "mean"]) -> Tensor:
        """Return the sum or the mean of a tensor over the ranks."""
        if self.trainer.world_size == 1:
            return value
        total = value.detach().clone()
        distributed.all_reduce(total)  # Lightning's own reduction waits at a barrier first
        return total / self.trainer.world_size if reduce_op == "mean" else total
