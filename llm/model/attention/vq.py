"""Transformer-VQ: softmax attention over quantised keys, in linear time."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.contracts import CAUSAL, AttentionGeometry, LayerCache, Sight
from llm.errors import ConfigError
from llm.model.attention.attention_layer import QK_NORM_EPS, Attention
from llm.model.attention.codebook import Codebook
from llm.model.attention.kernels.reference import visible_keys
from llm.model.attention.views import pair_scores, softmax_weights
from llm.model.attention.vq_blocks import attend_blocks
from llm.model.attention.vq_cache import VQCache
from llm.model.position.position_module import Position


class VQAttention(Attention):
    """Exact attention over quantised keys, at a cost that grows linearly with the length.

    Each key is replaced by its nearest code. A block of queries attends to the keys of its own and the previous block
    one by one. Earlier keys are stored as the count of each code and the mean of its values. A code that n_s keys share
    is one key with ln n_s added to its score. The result equals quadratic attention over quantised keys. In the
    backward pass, values of far keys get a gradient and the keys do not. With `soft_gradient`, far keys get the
    gradient of counting them by a softmax over their distances to the codes.

    Args:
        geometry, position, layer_index, qk_norm, key_norm, qk_norm_eps: see `Attention`.
        block_size: tokens per block.
        soft_gradient: temperature, above 0, of the softmax that gives far keys their gradient; None for no gradient.
        codebook: factory, called with num_heads (the key/value heads), head_dim and seed.

    Raises:
        ConfigError: the position rotates far keys, so that a code would not represent them; soft_gradient is not
            above 0; block_size is below 1.

    Source: Lingle, "Transformer-VQ", arXiv:2309.16354, section 3.
    Differs: keys are split into heads; `model.position` (none, or ReRoPE, which rotates far queries and no far keys)
    replaces XL biases; counts reset where a document ends, so windows may be packed.
    """

    needs_bare_keys = True
    why_causal = "model.attention=vq counts only what came before a token"
    borrowed_parameters: ClassVar = ("codebook.codes", "codebook.mixing")

    def __init__(
        self,
        *,
        geometry: AttentionGeometry,
        position: Position,
        layer_index: int,
        qk_norm: bool,
        key_norm: bool,
        block_size: int,
        soft_gradient: float | None,
        codebook: Callable[..., Codebook],
        qk_norm_eps: float = QK_NORM_EPS,
    ) -> None:
        if block_size < 1:
            raise ConfigError(f"model.attention.block_size={block_size}: must be at least 1; 512 is usual")
        if soft_gradient is not None and soft_gradient <= 0:
            raise ConfigError(
                f"model.attention.soft_gradient={soft_gradient}: must be above 0, or null for no gradient; try 0.1"
            )
        self.block_size, self.soft_gradient = block_size, soft_gradient
        super().__init__(
            geometry=geometry,
            position=position,
            layer_index=layer_index,
            qk_norm=qk_norm,
            key_norm=key_norm,
            qk_norm_eps=qk_norm_eps,
        )
        self.codebook = codebook(num_heads=geometry.num_kv_heads, head_dim=geometry.head_dim, seed=layer_index)

    def check_position(self, position: Position) -> None:
        """Accept positions under which keys before the previous block score independently of their positions."""
        name, bare = type(position).__name__, position.bare_keys_from
        if bare is None:
            raise ConfigError(
                f"model.position={name}: rotates far keys by their positions, and model.attention=vq stores only how "
                "often each code occurred; use model/position=rerope (bare keys beyond its window) or none"
            )
        if bare > self.block_size + 1:
            raise ConfigError(
                f"model.position.window={bare}: model.attention=vq stores no positions of keys that are "
                f"model.attention.block_size={self.block_size} or more tokens behind; use a window of at most "
                f"{self.block_size + 1}, or longer blocks"
            )

    def attend(
        self,
        q: Float[Tensor, "batch time heads head_dim"],
        k: Float[Tensor, "batch time kv_heads head_dim"],
        v: Float[Tensor, "batch time kv_heads head_dim"],
        *,
        positions: Int[Tensor, "batch time"],
        document_ids: Int[Tensor, "batch time"] | None,
        cache: Any,
        sight: Sight = CAUSAL,
        **gates: Tensor,
    ) -> tuple[Float[Tensor, "batch time heads head_dim"], dict[str, Tensor], dict[str, Tensor]]:
        """Quantise keys and mix values block by block."""
        quantized = self.codebook(k)
        views = self.position(q, quantized.keys, positions)
        ids = torch.zeros_like(positions) if document_ids is None else document_ids
        codes = self.codebook.all_codes().detach().to(k.dtype)
        if cache is None:
            temperature = self.soft_gradient if torch.is_grad_enabled() else None
            shares = None if temperature is None else self.codebook.soft_assignment(k, temperature)
            mixed = attend_blocks(
                views, v, code_ids=quantized.code_ids, codes=codes, document_ids=ids, block_size=self.block_size,
                scale=self.scale, assignment=shares,
            )  # fmt: skip
        else:
            mixed = cache.attend(views, v, quantized.code_ids, ids, codes=codes, scale=self.scale)
        return mixed, quantized.losses, quantized.metrics

    def pair_weights(
        self,
        q: Float[Tensor, "batch time heads head_dim"],
        k: Float[Tensor, "batch time kv_heads head_dim"],
        *,
        positions: Int[Tensor, "batch time"],
        document_ids: Int[Tensor, "batch time"] | None,
        sight: Sight = CAUSAL,
        **gates: Tensor,
    ) -> Float[Tensor, "batch heads time time"]:
        """Return the softmax over quantised keys; those before the previous block are constants; see `Attention`."""
        time, keys = q.shape[1], self.codebook(k).keys
        live = pair_scores(self.position(q, keys, positions))
        constant = pair_scores(self.position(q, keys.detach(), positions))
        block = torch.arange(time, device=q.device) // self.block_size
        scores = torch.where(block[:, None] - block <= 1, live, constant) * self.scale
        visible = visible_keys(time=time, time_k=time, device=q.device, document_ids=document_ids, window=None)
        return softmax_weights(scores, visible).flatten(1, 2)

    def new_cache(self, *, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> LayerCache:
        """Return an empty cache: means and counts of the codes and at most three blocks, at any max_length."""
        return VQCache(
            batch=batch, block_size=self.block_size, codebook_size=self.codebook.codebook_size, device=device
        )

    def mixing_flops_per_token(self, context_length: int, sight: Sight = CAUSAL) -> float:
        """Count scores and values over the codes and 1.5 blocks, the choice of codes, and the sums of values."""
        seen = min((context_length + 1) / 2, 1.5 * self.block_size + self.codebook.codebook_size)
        choice = 2.0 * self.num_kv_heads * self.codebook.codebook_size * self.head_dim
        return 4.0 * self.num_heads * self.head_dim * seen + choice + self.num_kv_heads * self.head_dim
