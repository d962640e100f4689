"""Computes losses over overlapping windows, as published perplexities are computed."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from llm.contracts import IGNORED_LABEL
from llm.evals.evaluation import Subject, token_losses
from llm.ops.loss import loss_and_byte_sums


def strided_sums(subject: Subject, data: Any, *, stride: int) -> tuple[float, float, float]:
    """Return the summed loss in nats, the number of labels and their bytes over overlapping windows of each document.

    Windows of context_length tokens begin every `stride` tokens. Each token except the first of a document is scored
    once, in the first window that has it. All tokens but those of the first window therefore follow at least
    context_length − stride tokens. Ends of documents carry no loss. Reading stops after loader.val_tokens tokens.

    Source: "Perplexity of fixed-length models" in the documentation of transformers.
    """
    token_bytes = torch.as_tensor(data.tokenizer.token_bytes, device=subject.device).float()
    total = torch.zeros(3, dtype=torch.float64, device=subject.device)
    rows: list[tuple[Tensor, Tensor]] = []
    length, scored = subject.context_length, 0
    for ids in held_out_documents(data):
        total[2] += token_bytes[data.tokenizer.bos_id]  # the bytes that the tokenizer adds to each document, negative
        for row in _windows(ids, length=length, stride=stride):
            rows.append(row)
            if len(rows) == data.micro_batch_size:
                total += _sums(subject, rows, token_bytes)
                rows = []
        scored += len(ids)
        if scored >= data.max_val_tokens:
            break
    if rows:
        total += _sums(subject, rows, token_bytes)
    loss, tokens, num_bytes = total.tolist()
    return loss, tokens, num_bytes


def held_out_documents(data: Any) -> Iterator[Int[np.ndarray, " ids"]]:
    """Yield the ids of each held-out document, its bos token included."""
    stream = data.cache.val
    ids = np.asarray(stream.read(0, len(stream))).astype(np.int64)
    starts = np.flatnonzero(ids == data.tokenizer.bos_id)
    for start, end in zip(starts, np.append(starts[1:], len(ids)), strict=True):
        yield ids[start:end]


def _windows(ids: Int[np.ndarray, " ids"], *, length: int, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield input ids and labels of each window of a document, padded to `length`."""
    scored_to = 1
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        inputs, labels = torch.zeros(length, dtype=torch.long), torch.full((length,), IGNORED_LABEL)
        inputs[: end - begin] = torch.from_numpy(ids[begin:end])
        labels[scored_to - begin - 1 : end - begin - 1] = torch.from_numpy(ids[scored_to:end])
        yield inputs, labels
        scored_to = end
        if end == len(ids):
            return


def _sums(subject: Subject, rows: list[tuple[Tensor, Tensor]], token_bytes: Tensor) -> Tensor:
    inputs, labels = (torch.stack(tensors).to(subject.device) for tensors in zip(*rows, strict=True))
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    losses = token_losses(subject, inputs, labels, positions=positions, document_ids=None)
    return loss_and_byte_sums(losses, labels, token_bytes)
