"""Copies tokens into rows sorted by expert, and sums rows back into tokens, with gathers in both directions."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def sum_rows(
    y: Float[Tensor, "rows d_model"], rows: Int[Tensor, " rows"], num_tokens: int
) -> Float[Tensor, "tokens d_model"]:
    """Sum each token's rows in the order of its slots, which gives the same bits each time, unlike atomic sums."""
    places = rows.view(num_tokens, -1)
    if y.is_cuda:
        return y[places].sum(1)
    return F.embedding_bag(places, y, mode="sum")


class GatherRows(torch.autograd.Function):
    """The gather x[token_ids], whose backward pass is `sum_rows`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_ids: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_tokens = x.shape[0]
        return x.index_select(0, token_ids)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return sum_rows(grads[0].contiguous(), rows, ctx.num_tokens), None, None


class SumRows(torch.autograd.Function):
    """The sum `sum_rows`, whose backward pass is x[token_ids]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, token_ids: Tensor, rows: Tensor, num_tokens: int) -> Tensor:
        ctx.save_for_backward(token_ids)
        return sum_rows(y, rows, num_tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (token_ids,) = ctx.saved_tensors
        return grads[0].index_select(0, token_ids), None, None, None
