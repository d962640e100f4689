"""A micro-batch of zeros and its loss, with which memory is forecast and measured."""

import torch

from llm.contracts import WHOLE_UPDATE, Batch, Objective
from llm.model.transformer import Transformer
from llm.ops.noise import KeyedNoise

NO_TOKEN = -1
"""The bos_id of a trial on zeros, of which none begins a document."""


def trial_batch(windows: int, context_length: int, device: torch.device) -> Batch:
    """Return windows of zeros, each one document with a label at every token."""
    ids = torch.zeros(windows, context_length, dtype=torch.long, device=device)
    positions = torch.arange(context_length, device=device).expand(windows, -1)
    return Batch(input_ids=ids, labels=ids, positions=positions, document_ids=torch.zeros_like(ids))


def trial_loss(model: Transformer, objective: Objective, batch: Batch) -> torch.Tensor:
    """Return the loss of a micro-batch that is an update of its own."""
    noise = KeyedNoise(0, 0, torch.arange(len(batch["input_ids"]), device=batch["input_ids"].device))
    prepared = objective.prepare(model, batch, noise)
    return objective.loss(model, model, prepared, model(**prepared.inputs), WHOLE_UPDATE)[0]
