"""Computes losses of micro-batches whose mean over micro-batches and ranks is the loss per label of the update."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from llm.contracts import LabelCounter


class UpdateLoss:
    """The cross-entropy of micro-batches, normalised by the labels of the whole update.

        loss of a micro-batch = Σ nll · num_parts / num_labels,   num_parts = micro-batches x ranks of the update

    The trainer averages over micro-batches and the strategy over ranks. A mean per micro-batch would give the labels of
    a micro-batch with few of them a larger weight, so that accumulation would change the gradient. Where every label
    carries a loss, all micro-batches have as many labels, and the mean per micro-batch is the same.
    """

    def __init__(self) -> None:
        self._step, self._num_labels = -1, None

    def of_micro_batch(
        self,
        measure: Callable[..., Tensor],
        hidden: Float[Tensor, "batch time d_model"],
        labels: Int[Tensor, "batch time"],
        *,
        trainer: Any,
    ) -> Tensor:
        """Return the loss of one micro-batch in nats per label."""
        num_labels = self._labels_of_step(trainer)
        num_parts = trainer.accumulate_grad_batches * trainer.world_size
        return share_of_loss(measure, hidden, labels, num_labels=num_labels, num_parts=num_parts)

    def _labels_of_step(self, trainer: Any) -> int | None:
        """Return the number of labels of the current update, counted once per update and without the device."""
        if trainer.global_step != self._step:
            data = trainer.datamodule
            is_counted = isinstance(data, LabelCounter)
            self._num_labels = data.labels_of_step(trainer.global_step) if is_counted else None
            self._step = trainer.global_step
        return self._num_labels


def share_of_loss(
    measure: Callable[..., Tensor],
    hidden: Float[Tensor, "batch time d_model"],
    labels: Int[Tensor, "batch time"],
    *,
    num_labels: int | None,
    num_parts: int,
) -> Tensor:
    """Return the loss of one of `num_parts` micro-batches, whose mean is the loss per label of the update.

    Args:
        measure: `f(hidden, labels, reduction=…)`, the cross-entropy of the decoder.
        hidden: last hidden states.
        labels: token ids; ignored ones carry no loss.
        num_labels: labels of the update that carry a loss; None where all do.
        num_parts: micro-batches of the update over all ranks.
    """
    if num_labels is None:
        return measure(hidden, labels)
    return measure(hidden, labels, reduction="sum") * (num_parts / max(1, num_labels))
