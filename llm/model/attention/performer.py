"""Performer attention: softmax attention estimated by positive random features, in linear time."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm.contracts import CAUSAL, AttentionGeometry, LayerCache, Sight
from llm.errors import ConfigError
from llm.model.attention.attention_layer import QK_NORM_EPS
from llm.model.attention.kernels.reference import visible_keys
from llm.model.attention.performer_chunks import EMPTY, chunked_performer
from llm.model.attention.recurrent import RecurrentAttention
from llm.model.attention.states import StateCache
from llm.model.position.position_module import Position

PAIR_ELEMENTS = 1 << 24
"""Sums of two log features that `pair_weights` holds at a time: 64 MiB in fp32. More would not run faster."""


class PerformerAttention(RecurrentAttention):
    """An estimate of softmax attention by random features whose mean product is exp(q·k), in linear time.

        exp(q·k) = E_ω[exp(ω·q − ‖q‖²/2) exp(ω·k − ‖k‖²/2)],   ω ~ N(0, I),  q and k scaled by head_dim^(−1/4)

    Positions act before the features, as in softmax attention. The relative error of a weight grows like
    exp(‖q + k‖²/2), so the estimate needs short vectors:

    - qk_norm: gains start at head_dim^(−1/4), so that ‖q‖² = ‖k‖² = 1. With 256 features and untrained weights the
      relative error of the output is 0.10, 0.10, 0.09 for head sizes 32, 64, 128. It grows if training raises gains.
    - key_norm: ‖k‖ = 1 and ‖q‖² ≈ head_dim, and the error is 0.68, 0.73, 0.82. Moving length from queries to keys
      keeps q·k, but the error rises to 1.1, 1.3, 1.7 where both are equally long.
    - neither: ‖q‖² ≈ ‖k‖² ≈ √head_dim, and the error is above 1, worse than an output of zero.

    Args:
        geometry, position, layer_index, qk_norm, key_norm, qk_norm_eps: see `Attention`.
        num_features: random directions ω, orthogonal in groups of head_dim; the error falls as num_features^(−1/2).
        feature_seed: seed of the directions; each layer draws its own. They are stored with the weights.
        chunk_size: tokens that are computed as one product in training; the result does not depend on it.

    Raises:
        ConfigError: the position has two views, or a count is below 1.

    Source: Choromanski et al., "Rethinking Attention with Performers", arXiv:2009.14794, eq. 7, section 2.4.
    Differs: features are stored as logarithms under running maxima, so no constant is added for stability and no token
    changes earlier outputs; ‖q‖² is dropped because it cancels; states reset where a document ends.
    """

    option = "performer"
    why_causal = "model.attention=performer sums only what came before a token"
    directions: Tensor

    def __init__(
        self,
        *,
        geometry: AttentionGeometry,
        position: Position,
        layer_index: int,
        qk_norm: bool,
        key_norm: bool,
        num_features: int,
        feature_seed: int,
        chunk_size: int,
        qk_norm_eps: float = QK_NORM_EPS,
    ) -> None:
        super().__init__(
            geometry=geometry,
            position=position,
            layer_index=layer_index,
            qk_norm=qk_norm,
            key_norm=key_norm,
            qk_norm_eps=qk_norm_eps,
        )
        for key, value in (("num_features", num_features), ("chunk_size", chunk_size)):
            if value < 1:
                raise ConfigError(f"model.attention.{key}={value}: must be at least 1; try 64")
        self.num_features, self.chunk_size = num_features, chunk_size
        self.add_convolution(0)
        generator = torch.Generator().manual_seed(feature_seed * 100_003 + layer_index)
        if self.q_norm is not None and self.k_norm is not None:
            for norm in (self.q_norm, self.k_norm):
                nn.init.constant_(norm.weight, geometry.head_dim**-0.25)
        self.register_buffer(
            "directions", orthogonal_directions(count=num_features, dim=geometry.head_dim, generator=generator)
        )

    def log_features(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return ω·q and ω·k − ‖k‖²/2 of rotated and scaled queries and keys, in fp32 (fp64 for fp64)."""
        (view,) = self.position(q, k, positions)
        q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) * self.scale**0.5 for x in (view.q, view.k))
        directions = self.directions.to(q.dtype)
        return q @ directions.T, k @ directions.T - k.square().sum(-1, keepdim=True) / 2

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, ids: Tensor, cache: StateCache, **gates: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mix by sums per feature under running maxima; see `RecurrentAttention`."""
        log_q, log_k = self.log_features(q, k, positions)
        return chunked_performer(
            log_q, log_k, v.to(log_q.dtype), document_ids=ids, chunk_size=self.chunk_size,
            initial=cache.states, before=cache.document,
        )  # fmt: skip

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
        """Return the softmax of log weights, each the log-sum-exp over features; see `Attention`."""
        group, time = self.num_heads // self.num_kv_heads, q.shape[1]
        log_q, log_k = self.log_features(q, k, positions)
        log_k = log_k.repeat_interleave(group, dim=2)
        queries_at_once = max(1, PAIR_ELEMENTS // log_k.numel())
        parts = log_q.split(queries_at_once, dim=1)
        scores = torch.cat([torch.logsumexp(part[:, :, None] + log_k[:, None], dim=-1) for part in parts], dim=1)
        visible = visible_keys(time=time, time_k=time, device=q.device, document_ids=document_ids, window=None)
        # scores are [batch time time heads]
        return scores.masked_fill(~visible[..., None], float("-inf")).softmax(2).permute(0, 3, 1, 2)

    def new_cache(self, *, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> LayerCache:
        """Return empty states: sums of values and weights per feature, in fp32, of the same size at any length."""
        options: dict[str, Any] = {"dtype": torch.promote_types(dtype, torch.float32), "device": device}
        shape = (batch, self.num_kv_heads, self.num_features)
        states = {
            "sums": torch.zeros(*shape, self.head_dim + 1, **options),
            "maxima": torch.full(shape, EMPTY, **options),
        }
        return StateCache(batch=batch, states=states, device=device)

    def mixing_flops_per_token(self, context_length: int, sight: Sight = CAUSAL) -> float:
        """Count features, products inside a chunk (half of them masked) and products with the state."""
        chunk = min(self.chunk_size, context_length)
        draw = 2.0 * (self.num_heads + self.num_kv_heads) * self.head_dim * self.num_features
        inside = 2.0 * self.num_heads * chunk * (self.num_features + self.head_dim)
        return draw + inside + 4.0 * self.num_heads * self.num_features * (self.head_dim + 1)


def orthogonal_directions(*, count: int, dim: int, generator: torch.Generator) -> Float[Tensor, "count dim"]:
    """Draw directions that are normal vectors one by one and orthogonal in groups of `dim`.

    Source: Choromanski et al., arXiv:2009.14794, section 2.4; norms of independent normal vectors.
    """
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    groups = [torch.linalg.qr(torch.randn(dim, dim, **options)) for _ in range(-(-count // dim))]
    # signs make the orthogonal matrix uniform (Mezzadri, arXiv:math-ph/0609050, section 5)
    units = torch.cat([(q * r.diagonal().sign()).T for q, r in groups])[:count]
    lengths = torch.randn(count, dim, **options).norm(dim=1, keepdim=True)
    return (units * lengths).float()
