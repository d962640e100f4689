"""Attention over depth: each sublayer reads a weighted sum of earlier blocks instead of their plain sum."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm.contracts import CAUSAL, LayerCache, Sight
from llm.errors import ConfigError
from llm.model.block import Block

USUAL_BLOCKS = 8
"""Number of blocks that the source finds enough at any depth."""


class DepthSource(NamedTuple):
    """A vector per token that sublayers may read."""

    value: Float[Tensor, "batch time d_model"]
    inverse_rms: Float[Tensor, "batch time"]


class Depth(NamedTuple):
    """The residual stream as its parts: the embedding and the sums of completed blocks, and the current block's sum."""

    finished: tuple[DepthSource, ...]
    running: Tensor | None


class DepthRead(NamedTuple):
    """What a sublayer reads, and the weight of each source for each token."""

    hidden: Float[Tensor, "batch time d_model"]
    weights: Float[Tensor, "batch time sources"]


class DepthQuery(nn.Module):
    """The softmax over sources that one sublayer reads by.

        a_s = softmax over s of w·y_s / rms(y_s),   read = S Σ_s a_s y_s

    The number of sources S as a factor makes a new model, whose w is 0, read the plain sum. The norm that follows
    removes the factor.

    Args:
        d_model: width of the residual stream.
        eps: added to the mean square of a source; that of the norms.
        num_sources: S, for the count of FLOPs.

    Source: "Block Attention Residuals", arXiv:2603.15031; Su Jianlin, kexue.fm/archives/11664.
    """

    parameter_kinds: ClassVar = {"query": "vector"}

    def __init__(self, *, d_model: int, eps: float, num_sources: int) -> None:
        super().__init__()
        self.eps, self.num_sources = eps, num_sources
        self.query = nn.Parameter(torch.zeros(d_model))

    def forward(self, depth: Depth) -> DepthRead:
        """Return the weighted sum of all sources, computed in at least fp32."""
        sources = depth.finished
        if depth.running is not None:
            sources = (*sources, as_source(depth.running, self.eps))
        with torch.autocast(sources[0].value.device.type, enabled=False):
            query = self.query.to(sources[0].inverse_rms.dtype)
            logits = [(source.value.to(query.dtype) @ query) * source.inverse_rms for source in sources]
            weights = torch.stack(logits, -1).softmax(-1)
            shares = (weights * len(sources)).to(sources[0].value.dtype).unbind(-1)
            read = shares[0][..., None] * sources[0].value
            for share, source in zip(shares[1:], sources[1:], strict=True):
                read = torch.addcmul(read, share[..., None], source.value.to(read.dtype))
        return DepthRead(read, weights.detach())

    def flops_per_token(self) -> float:
        """Count the products of a source with the query and with its weight, and the mean square of the last one."""
        return 4.0 * (self.num_sources + 1) * self.query.numel()


class DepthBlock(Block):
    """A layer of two sublayers that read by `DepthQuery` and add to the sum of their block.

    Args:
        index: index of the layer, from 0.
        block_size: sublayers per block.
        d_model: width of the residual stream.
        attention, ffn, norm, dropout: see `Block`.
    """

    def __init__(
        self,
        *,
        index: int,
        block_size: int,
        d_model: int,
        attention: nn.Module,
        ffn: nn.Module,
        norm: Callable[[], nn.Module],
        dropout: float,
    ) -> None:
        super().__init__(attention=attention, ffn=ffn, norm=norm, dropout=dropout)
        self.block_size, self.first = block_size, 2 * index
        eps = norm_eps(self.attention_norm)
        self.attention_query, self.ffn_query = (
            DepthQuery(d_model=d_model, eps=eps, num_sources=num_sources(place, block_size))
            for place in (self.first, self.first + 1)
        )

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        depth: Depth,
        *,
        positions: Int[Tensor, "batch time"],
        document_ids: Int[Tensor, "batch time"] | None,
        cache: LayerCache | None = None,
        sight: Sight = CAUSAL,
    ) -> tuple[Depth, dict[str, Tensor], dict[str, Tensor]]:
        """Run both sublayers; return the parts after them, losses and metrics."""
        read = self.attention_norm(self.attention_query(depth).hidden)
        mixed = self.attention(read, positions=positions, document_ids=document_ids, cache=cache, sight=sight)
        depth = self._add(depth, mixed.hidden, self.first)
        fed = self.ffn(self.ffn_norm(self.ffn_query(depth).hidden))
        depth = self._add(depth, fed.hidden, self.first + 1)
        return depth, mixed.losses | fed.losses, mixed.metrics | fed.metrics

    def _add(self, depth: Depth, output: Tensor, place: int) -> Depth:
        """Add the output of sublayer number `place` to its block, and complete the block after its last sublayer."""
        output = self.dropout(output).to(depth.finished[0].value.dtype)
        total = output if depth.running is None else depth.running + output
        if (place + 1) % self.block_size:
            return Depth(depth.finished, total)
        return Depth((*depth.finished, as_source(total, self.attention_query.eps)), None)

    def flops_per_token(self, context_length: int, sight: Sight = CAUSAL) -> float:
        """Return forward FLOPs per clean token, reading from depth included."""
        copies = 2 if sight.kind == "block_pair" else 1
        reading = self.attention_query.flops_per_token() + self.ffn_query.flops_per_token()
        return super().flops_per_token(context_length, sight) + copies * reading


def as_source(value: Tensor, eps: float) -> DepthSource:
    """Return a vector with 1 / sqrt(mean square + eps), in at least fp32."""
    precise = value.to(torch.promote_types(value.dtype, torch.float32))
    mean_square = torch.linalg.vector_norm(precise, dim=-1).square() / value.shape[-1]
    return DepthSource(value, (mean_square + eps).rsqrt())


def num_sources(place: int, block_size: int) -> int:
    """Return how many sources precede sublayer number `place`: the embedding, whole blocks and the current block."""
    return 1 + -(-place // block_size)


def norm_eps(norm: Any) -> float:
    """Return what a norm of the decoder adds to the mean square."""
    return float(norm.eps)


def choose_block(
    residual: Literal["sum", "attention"], block_size: int | None, *, num_layers: int, d_model: int
) -> Callable[[int], Callable[..., Block]]:
    """Return the factory of the layer with a given index.

    Raises:
        ConfigError: block_size is out of range, or set for a plain sum.
    """
    if residual == "sum":
        if block_size is not None:
            raise ConfigError(
                f"model.residual_block={block_size}: only model.residual=attention has blocks; set it to null"
            )
        return lambda _index: Block
    size = depth_block_size(block_size, num_layers=num_layers)
    return lambda index: partial(DepthBlock, index=index, block_size=size, d_model=d_model)


def final_query(last: nn.Module, *, d_model: int) -> DepthQuery | None:
    """Return the query of the final norm, or None where the last layer adds to a plain sum."""
    if not isinstance(last, DepthBlock):
        return None
    sources = num_sources(last.first + 2, last.block_size)
    return DepthQuery(d_model=d_model, eps=last.attention_query.eps, num_sources=sources)


def depth_block_size(block_size: int | None, *, num_layers: int) -> int:
    """Return the sublayers per block: the given number, or an eighth of all, at least 1.

    Raises:
        ConfigError: the number is below 1 or above that of all sublayers.
    """
    if block_size is None:
        return max(1, 2 * num_layers // USUAL_BLOCKS)
    if not 1 <= block_size <= 2 * num_layers:
        raise ConfigError(
            f"model.residual_block={block_size}: must lie in [1, {2 * num_layers}], the sublayers of the decoder; "
            f"null for {depth_block_size(None, num_layers=num_layers)}"
        )
    return block_size
