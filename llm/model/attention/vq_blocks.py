"""Attention over quantised keys in blocks: near keys one by one, and far keys as counted codes."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llm.contracts import PositionView
from llm.model.attention.states import Documents, carry_states
from llm.model.attention.views import attend_views

NEVER = -30000.0
"""The score of a code that no key chose: its weight is 0 in every dtype, and fp16 can represent the score."""


def attend_blocks(
    views: tuple[PositionView, ...],
    v: Float[Tensor, "batch time kv_heads value_dim"],
    *,
    code_ids: Int[Tensor, "batch time kv_heads"],
    codes: Float[Tensor, "kv_heads codes head_dim"],
    document_ids: Int[Tensor, "batch time"],
    block_size: int,
    scale: float,
    assignment: Float[Tensor, "batch time kv_heads codes"] | None = None,
) -> Float[Tensor, "batch time heads value_dim"]:
    """Mix values by the softmax over quantised keys of the same document, in time linear in the length.

    Each block becomes a separate row whose keys are the codes, the previous block and the block itself.

    Args:
        views: views of queries and quantised keys; the last view's keys are the codes themselves.
        v: values.
        code_ids: code of each key.
        codes: all codes.
        document_ids: document of each token, ascending along a row.
        block_size: tokens per block.
        scale: factor on the scores.
        assignment: share of each key in each code, where that needs a gradient; None counts by code_ids.

    Source: Lingle, "Transformer-VQ", arXiv:2309.16354, theorem 3.7 and appendix E (the reduction by blocks).
    """
    time = v.shape[1]
    if time <= 2 * block_size:  # every key is near
        return attend_views(views, v, document_ids=document_ids, scale=scale)
    missing = -time % block_size
    if assignment is None:
        sum_values = partial(sum_by_code, num_codes=codes.shape[1])
        far = _far_values(v, code_ids, document_ids, sum_values=sum_values, block_size=block_size)
    else:
        far = _far_values(v, assignment, document_ids, sum_values=_sum_by_share, block_size=block_size)
    ids = F.pad(document_ids, (0, missing), value=torch.iinfo(document_ids.dtype).max).unflatten(1, (-1, block_size))
    nobody = torch.full_like(ids[:, :1], torch.iinfo(ids.dtype).min)
    previous = torch.cat((nobody, ids[:, :-1]), dim=1)
    of_state = torch.cat((nobody, nobody, ids[:, :-2]), dim=1)[..., -1]
    value_rows = _with_previous(v, missing, block_size)
    rows = []
    for view in views:
        queries = _blocks(view.q, missing, block_size).flatten(0, 1)
        keys = _with_previous(view.k, missing, block_size).flatten(0, 1)
        rows.append(view._replace(q=queries, k=keys))
    mixed = attend_codes(
        tuple(rows), value_rows.flatten(0, 1), torch.cat((previous, ids), dim=2).flatten(0, 1), codes=codes,
        counts=far[..., -1].flatten(0, 1), means=far[..., :-1].flatten(0, 1), state_ids=of_state.flatten(), scale=scale,
    )  # fmt: skip
    return mixed.unflatten(0, (v.shape[0], -1)).flatten(1, 2)[:, :time]


def attend_codes(
    views: tuple[PositionView, ...],
    v: Float[Tensor, "batch time_k kv_heads value_dim"],
    document_ids: Int[Tensor, "batch time_k"],
    *,
    codes: Float[Tensor, "kv_heads codes head_dim"],
    counts: Float[Tensor, "batch kv_heads codes"],
    means: Float[Tensor, "batch kv_heads codes value_dim"],
    state_ids: Int[Tensor, " batch"],
    scale: float,
) -> Float[Tensor, "batch time heads value_dim"]:
    """Attend to codes and to the keys after them; ln(count) is added to the score of each code.

    The logarithm becomes two more components of the key, a rounded one and the rounding error, and the query gets two
    ones. Any attention kernel can compute this, and bf16 loses no precision.

    Args:
        views: as in `attend_views`; queries belong to the last keys.
        v: values of the keys.
        document_ids: document of each key.
        codes: all codes.
        counts: number of far keys per code.
        means: mean value of those keys.
        state_ids: document of counts and means; queries of another document do not see them.
        scale: factor on the scores.
    """
    bias = torch.where(counts > 0, counts.clamp_min(1).log() / scale, NEVER)
    rounded = bias.to(codes.dtype)
    rest = torch.where(counts > 0, bias - rounded, 0.0).to(codes.dtype)
    far = torch.cat((codes.expand(len(v), -1, -1, -1), rounded[..., None], rest[..., None]), dim=-1).transpose(1, 2)
    extended = tuple(
        view._replace(q=F.pad(view.q, (0, 2), value=1.0), k=torch.cat((far, F.pad(view.k, (0, 2))), dim=1))
        for view in views
    )
    values = torch.cat((means.transpose(1, 2).to(v.dtype), v), dim=1)
    ids = torch.cat((state_ids[:, None].expand(-1, codes.shape[1]), document_ids), dim=1)
    return attend_views(extended, values, document_ids=ids, scale=scale)


def _far_values(
    v: Tensor, choice: Tensor, document_ids: Tensor, *, sum_values: Callable[..., Tensor], block_size: int
) -> Float[Tensor, "batch blocks kv_heads codes value_dim_and_count"]:
    """Return, per block, the mean value and the count of each code over all tokens before the previous block.

    Only the document that ends the block before the previous one counts, because no other spans a whole block.
    """
    whole = v.shape[1] // block_size * block_size
    first = document_ids.new_zeros(len(v))
    documents = Documents.cut(document_ids[:, :whole], size=block_size, before=first)
    values = F.pad(v[:, :whole].to(torch.promote_types(v.dtype, torch.float32)), (0, 1), value=1.0)
    values = values.unflatten(1, (-1, block_size))
    values = torch.where(documents.is_carried[..., None, None], values, 0.0)
    choice = choice[:, :whole].unflatten(1, (-1, block_size))
    sums = sum_values(values.flatten(0, 1), choice.flatten(0, 1))
    sums = sums.unflatten(0, (len(v), -1)).transpose(0, 1)
    keep = documents.continues.transpose(0, 1)[..., None, None, None].to(sums.dtype)
    states = carry_states(keep, sums, torch.zeros_like(sums[0]))
    num_blocks = -(-v.shape[1] // block_size)
    after = (torch.arange(num_blocks, device=v.device) - 1).clamp_min(
        0
    )  # block r reads the state after r − 1 blocks, which is that before the previous block
    totals = states[after].transpose(0, 1)
    return torch.cat((totals[..., :-1] / totals[..., -1:].clamp_min(1.0), totals[..., -1:]), dim=-1)


def sum_by_code(
    values: Float[Tensor, "rows time kv_heads dim"], code_ids: Int[Tensor, "rows time kv_heads"], num_codes: int
) -> Float[Tensor, "rows kv_heads codes dim"]:
    """Sum the values of the keys of each code."""
    index = code_ids.transpose(1, 2)[..., None].expand(-1, -1, -1, values.shape[-1])
    zeros = values.new_zeros(len(values), values.shape[2], num_codes, values.shape[-1])
    return zeros.scatter_add(2, index, values.transpose(1, 2))


def _sum_by_share(values: Tensor, shares: Tensor) -> Tensor:
    """Sum the values of the keys of each code, weighted by their shares."""
    return torch.einsum("rtgs,rtgd->rgsd", shares.to(values.dtype), values)


def _blocks(x: Tensor, missing: int, block_size: int) -> Tensor:
    """Cut [batch time heads dim] into [batch blocks block_size heads dim], padded with zeros at the end."""
    return F.pad(x, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, block_size))


def _with_previous(x: Tensor, missing: int, block_size: int) -> Tensor:
    """Return each block after its previous one, [batch blocks 2·block_size heads dim]; zeros before the first."""
    blocks = _blocks(x, missing, block_size)
    return torch.cat((F.pad(blocks[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)), blocks), dim=2)
