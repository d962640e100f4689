"""Decides which tokens every objective scores, and scores them exactly."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm.contracts import IGNORED_LABEL, Batch, LossShare, Prepared
from llm.ops.loss import chunk_scores


def scored_tokens(batch: Batch, bos_id: int) -> Bool[Tensor, "batch time"]:
    """Return which input tokens are predicted by every objective: those with a label, except bos tokens.

    The first token of a window is never scored. A bos token stays clean, since positions would give it away.
    """
    scored = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    scored[:, 1:] = batch["labels"][:, :-1] != IGNORED_LABEL
    return scored & (batch["input_ids"] != bos_id)


def shared_labels(batch: Batch, bos_id: int) -> Int[Tensor, "batch time"]:
    """Return the labels of the tokens that every objective scores, `IGNORED_LABEL` elsewhere."""
    labels = batch["labels"].masked_fill(batch["labels"] == bos_id, IGNORED_LABEL)
    labels[:, -1] = IGNORED_LABEL
    return labels


@torch.no_grad()
def nll_without(
    model: Any, hidden: Float[Tensor, "batch time d_model"], labels: Int[Tensor, "batch time"], *, banned_id: int
) -> Float[Tensor, "batch time"]:
    """Return the cross-entropy per token where one token id has probability 0; 0 where a label is ignored."""
    chunk = max(1, chunk_scores(hidden.device.type) // model.vocab_size)
    losses = []
    for states, ids in zip(hidden.flatten(0, 1).split(chunk), labels.flatten().split(chunk), strict=True):
        scores = model.logits(states[None])[0].float()
        scores[:, banned_id] = -torch.inf
        losses.append(F.cross_entropy(scores, ids, ignore_index=IGNORED_LABEL, reduction="none"))
    return torch.cat(losses).view(labels.shape)


def label_count(batch: Batch) -> Int[Tensor, ""]:
    """Return the number of labels of the input tokens, bos included: the divisor of every loss but next-token's."""
    return (batch["labels"][:, :-1] != IGNORED_LABEL).sum()


def per_label(total: Float[Tensor, ""], num_labels: Int[Tensor, ""], share: LossShare) -> Float[Tensor, ""]:
    """Return the summed loss of a micro-batch divided by labels, so that the mean over the parts is that of the update.

    Args:
        total: summed loss.
        num_labels: labels of this micro-batch, where all micro-batches of the update have as many.
        share: share of this micro-batch in its update.
    """
    if share.num_labels is None:
        return total / num_labels.clamp_min(1)
    return total * (share.num_parts / max(1, share.num_labels))


def weighted_loss(
    model: Any, hidden: Float[Tensor, "batch time d_model"], prepared: Prepared, share: LossShare
) -> Float[Tensor, ""]:
    """Return the weighted cross-entropy of the targets per label of the update."""
    labels, weights = prepared.targets["labels"], prepared.targets["weights"]
    total = model.loss(hidden, labels, reduction="sum", weights=weights)
    return per_label(total, prepared.targets["num_labels"], share)
