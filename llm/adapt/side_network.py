"""A narrow decoder that reads the hidden states of a frozen one."""

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm.contracts import AttentionGeometry, LayerCache, Sight
from llm.model.added_inputs import ExtraEmbedding, TimeEmbedding
from llm.model.attention.softmax import SoftmaxAttention
from llm.model.block import Block
from llm.model.ffn.swiglu import SwiGLU
from llm.model.norm import RMSNorm
from llm.model.position.rope import RoPE
from llm.model.transformer import Head
from llm.ops.linear_layer import Linear

NORM_EPS = 1e-6
"""Added to mean squares in the side network; the value that most decoders use."""
WIDTH_OF_FFN = 8 / 3
"""Hidden units of the side network's feed-forwards per channel: as many weights as a plain layer of four."""


class GatedShortcut(nn.Module):
    """A gate between a layer of the frozen decoder and the side network: s ← μ W norm(h) + (1 − μ) s.

    The share is μ = sigmoid(gate / T). The norm keeps the growing hidden states of later layers at one size.

    Args:
        d_model: width of the frozen decoder.
        d_side: width of the side network.
        temperature: T, above 0.
    """

    parameter_kinds: ClassVar = {"gate": "vector"}

    def __init__(self, *, d_model: int, d_side: int, temperature: float) -> None:
        super().__init__()
        self.down = Linear(d_model, d_side, bias=False)
        self.norm = RMSNorm(dim=d_model, eps=NORM_EPS)
        self.gate, self.temperature = nn.Parameter(torch.zeros(1)), temperature

    def forward(
        self, hidden: Float[Tensor, "batch time d_model"], side: Float[Tensor, "batch time d_side"] | None
    ) -> Float[Tensor, "batch time d_side"]:
        read = self.down(self.norm(hidden))
        if side is None:
            return read
        share = torch.sigmoid(self.gate / self.temperature).to(read.dtype)
        return share * read + (1 - share) * side


class SideNetwork(nn.Module):
    """Blocks of softmax attention and SwiGLU, each of which reads one hidden state of a frozen decoder.

    The first shortcut reads the embedding and has no gate. Extra tokens and times have embeddings of their own here,
    since those of the frozen decoder are not trained.

    Args:
        d_model: width of the frozen decoder.
        d_side: width of the side network.
        head_dim: size of its heads.
        reads: layers whose outputs are read, in order.
        temperature: see `GatedShortcut`.
        base: wavelength base of its rotary positions.
        extra_tokens: number of input ids above the vocabulary.
        num_times: number of times per token.
        vocab_size: size of a head of its own, or None for a projection to d_model.
    """

    def __init__(
        self,
        *,
        d_model: int,
        d_side: int,
        head_dim: int,
        reads: Sequence[int],
        temperature: float,
        base: float,
        extra_tokens: int,
        num_times: int,
        vocab_size: int | None,
    ) -> None:
        super().__init__()
        self.reads = tuple(reads)
        self.position = RoPE(head_dim=head_dim, base=base, log_n="none", train_length=None)
        heads = d_side // head_dim
        geometry = AttentionGeometry(d_model=d_side, num_heads=heads, num_kv_heads=heads, head_dim=head_dim)
        plain: dict[str, Any] = {"qk_norm": False, "key_norm": False, "window": None}
        self.embedding_shortcut = Linear(d_model, d_side, bias=False)
        self.embedding_norm = RMSNorm(dim=d_model, eps=NORM_EPS)
        self.shortcuts = nn.ModuleList(
            GatedShortcut(d_model=d_model, d_side=d_side, temperature=temperature) for _ in reads
        )
        self.blocks = nn.ModuleList(
            Block(
                attention=SoftmaxAttention(geometry=geometry, position=self.position, layer_index=i, **plain),
                ffn=SwiGLU(d_model=d_side, d_ff=max(1, round(WIDTH_OF_FFN * d_side))),
                norm=lambda: RMSNorm(dim=d_side, eps=NORM_EPS),
                dropout=0.0,
            )
            for i in range(len(reads))
        )
        self.norm = RMSNorm(dim=d_side, eps=NORM_EPS)
        self.extra_embedding = ExtraEmbedding(extra_tokens, d_side) if extra_tokens else None
        self.time_embedding = TimeEmbedding(num_times=num_times, d_model=d_side) if num_times else None
        self.up = Linear(d_side, d_model, bias=False) if vocab_size is None else None
        self.own_head = Head(d_side, vocab_size, bias=False) if vocab_size is not None else None

    def layers(self) -> list[Block]:
        """Return the blocks in order."""
        return [cast(Block, block) for block in self.blocks]

    def forward(
        self,
        states: Sequence[Float[Tensor, "batch time d_model"]],
        *,
        extra_ids: Int[Tensor, "batch time"] | None,
        times: Float[Tensor, "batch time num_times"] | None,
        caches: Sequence[LayerCache] | None,
        recompute_every: int,
        **options: Any,
    ) -> Float[Tensor, "batch time d_side"]:
        """Return the normalized last state.

        Args:
            states: embedding and output of each layer that is read.
            extra_ids: numbers of extra tokens from 0, and below 0 for tokens of the vocabulary; None without any.
            times: times per token; None without any.
            caches: one per block; None without decoding.
            recompute_every: recompute every n-th block in the backward pass; 0 for none.
            options: positions, document_ids and sight.
        """
        side = self._input(states[0], extra_ids, times)
        for index, (block, state) in enumerate(zip(self.layers(), states[1:], strict=True)):
            side = self.shortcuts[index](state, side)
            cache = None if caches is None else caches[index]
            if recompute_every and index % recompute_every == 0 and self.training and cache is None:
                out = checkpoint(block, side, cache=None, use_reentrant=False, **options)
                side = cast(Any, out).hidden
            else:
                side = block(side, cache=cache, **options).hidden
        return self.norm(side)

    def _input(self, embedded: Tensor, extra_ids: Tensor | None, times: Tensor | None) -> Tensor:
        side = self.embedding_shortcut(self.embedding_norm(embedded))
        if self.extra_embedding is not None and extra_ids is not None:
            extra = self.extra_embedding(extra_ids.clamp_min(0)).to(side.dtype)
            side = side + torch.where((extra_ids >= 0)[..., None], extra, torch.zeros_like(extra))
        if self.time_embedding is not None and times is not None:
            side = side + self.time_embedding(times).to(side.dtype)
        return side

    def flops_per_token(self, context_length: int, sight: Sight) -> float:
        """Return forward FLOPs per clean token, without a head of its own."""
        copies = 2 if sight.kind == "block_pair" else 1
        shortcuts = [self.embedding_shortcut, *(cast(GatedShortcut, each).down for each in self.shortcuts)]
        weights = sum(layer.weight.numel() for layer in shortcuts) * copies
        weights += 0 if self.up is None else self.up.weight.numel()
        return 2.0 * weights + sum(block.flops_per_token(context_length, sight) for block in self.layers())
