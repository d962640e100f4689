"""Performer attention: softmax attention estimated by positive random features, in linear time."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.contracts import AttentionGeometry, LayerCache
from llm.errors import ConfigError
from llm.model.attention.kernels.reference import visible_keys
from llm.model.attention.performer_chunks import EMPTY, chunked_performer
from llm.model.attention.recurrent import RecurrentAttention
from llm.model.attention.states import StateCache
from llm.model.position.base import Position


class PerformerAttention(RecurrentAttention):
    """Estimates softmax attention with features whose mean product is exp(q·k): linear time, one state for decoding.

        exp(q·k) = E_ω[exp(ω·q − ‖q‖²/2) exp(ω·k − ‖k‖²/2)],   ω ~ N(0, I),  q and k scaled by head_dim^(−1/4)

    Positions act before the features, as in softmax attention. The estimate is good while ‖q‖² and ‖k‖² are small
    (its relative error grows like exp(‖q + k‖²/2)); qk_norm with its learned gains, or key_norm, keeps them so.

    Args:
        geometry, position, layer_index, qk_norm, key_norm: see `Attention`.
        num_features: random directions ω, orthogonal in groups of head_dim; the error falls as num_features^(−1/2).
        feature_seed: of the draw; each layer has its own. The directions are kept with the weights.
        chunk_size: tokens that are computed as one product in training; the result does not depend on it.

    Raises:
        ConfigError: a position with two views, or a count below 1.

    Source: Choromanski et al., "Rethinking Attention with Performers", arXiv:2009.14794, eq. 7, section 2.4.
    Differs: features are kept as logarithms under running maxima, so nothing is added for stability and no token
    changes what came before it; ‖q‖² is left out, as it cancels; states reset where a document ends.
    """

    option = "performer"
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
    ) -> None:
        super().__init__(
            geometry=geometry, position=position, layer_index=layer_index, qk_norm=qk_norm, key_norm=key_norm
        )
        for key, value in (("num_features", num_features), ("chunk_size", chunk_size)):
            if value < 1:
                raise ConfigError(f"model.attention.{key}={value}: must be at least 1; try 64")
        self.num_features, self.chunk_size = num_features, chunk_size
        generator = torch.Generator().manual_seed(feature_seed * 100_003 + layer_index)
        self.register_buffer(
            "directions", orthogonal_directions(count=num_features, dim=geometry.head_dim, generator=generator)
        )

    def log_features(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return ω·q and ω·k − ‖k‖²/2 of placed and scaled queries and keys, in fp32 (fp64 for fp64)."""
        (view,) = self.position(q, k, positions)
        q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) * self.scale**0.5 for x in (view.q, view.k))
        directions = self.directions.to(q.dtype)
        return q @ directions.T, k @ directions.T - k.square().sum(-1, keepdim=True) / 2

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, ids: Tensor, cache: StateCache
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sums by feature under running maxima; see `RecurrentAttention`."""
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
    ) -> Float[Tensor, "batch heads time time"]:
        """The softmax of log weights, each the log-sum-exp over features; see `Attention`."""
        group, time = self.num_heads // self.num_kv_heads, q.shape[1]
        log_q, log_k = self.log_features(q, k, positions)
        log_k = log_k.repeat_interleave(group, dim=2)
        scores = torch.logsumexp(log_q[:, :, None] + log_k[:, None], dim=-1)  # [batch time time heads]
        visible = visible_keys(time=time, time_k=time, device=q.device, document_ids=document_ids, window=None)
        return scores.masked_fill(~visible[..., None], float("-inf")).softmax(2).permute(0, 3, 1, 2)

    def new_cache(self, *, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> LayerCache:
        """Return empty states: sums of values and weights by feature, kept in fp32, whatever max_length is."""
        options: dict[str, Any] = {"dtype": torch.promote_types(dtype, torch.float32), "device": device}
        shape = (batch, self.num_kv_heads, self.num_features)
        states = {
            "sums": torch.zeros(*shape, self.head_dim + 1, **options),
            "maxima": torch.full(shape, EMPTY, **options),
        }
        return StateCache(batch=batch, states=states, device=device)

    def mixing_flops_per_token(self, context_length: int) -> float:
        """The features, products inside a chunk, half of them masked, and those with the state."""
        chunk = min(self.chunk_size, context_length)
        draw = 2.0 * (self.num_heads + self.num_kv_heads) * self.head_dim * self.num_features
        inside = 2.0 * self.num_heads * chunk * (self.num_features + self.head_dim)
        return draw + inside + 4.0 * self.num_heads * self.num_features * (self.head_dim + 1)


def orthogonal_directions(*, count: int, dim: int, generator: torch.Generator) -> Float[Tensor, "count dim"]:
    """Draw directions that are normal one by one and orthogonal in groups of `dim`.

    Source: Choromanski et al., arXiv:2009.14794, section 2.4; norms of independent normal vectors.
    """
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    groups = [torch.linalg.qr(torch.randn(dim, dim, **options)) for _ in range(-(-count // dim))]
    # signs make the orthogonal matrix uniform (Mezzadri, arXiv:math-ph/0609050, section 5)
    units = torch.cat([(q * r.diagonal().sign()).T for q, r in groups])[:count]
    lengths = torch.randn(count, dim, **options).norm(dim=1, keepdim=True)
    return (units * lengths).float()
