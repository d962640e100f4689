"""What every attention shares: projections, query/key norm, positions, and the cache for decoding."""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm.contracts import LayerCache, SublayerOutput
from llm.errors import ConfigError
from llm.model.attention.cache import KeyValueCache
from llm.model.norm import RMSNorm
from llm.model.position.base import Position
from llm.ops.linear import Linear

QK_NORM_EPS = 1e-6


class Attention(nn.Module, ABC):
    """Projects to heads, hands queries, keys and values to `attend`, and projects back.

    Args:
        d_model: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: key/value heads; divides num_heads (grouped queries, arXiv:2305.13245).
        head_dim: size of a head.
        position: module called as `(q, k, positions) -> tuple[PositionView, ...]`, shared by all layers.
        layer_index: index of the layer, from 0.
        qk_norm: normalise queries and keys by head (RMSNorm with gain, arXiv:2302.05442), before positions.
        key_norm: score by q·k/‖k‖, without a gain and without head_dim^−1/2 (kexue.fm/archives/9859).

    Raises:
        ConfigError: num_kv_heads that does not divide num_heads, a position that this attention cannot use, or both
            norms at once.
    """

    def __init__(
        self,
        *,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        position: Position,
        layer_index: int,
        qk_norm: bool,
        key_norm: bool,
    ) -> None:
        super().__init__()
        if qk_norm and key_norm:
            raise ConfigError(
                "model.attention.key_norm=true: model.attention.qk_norm already sets the keys' length; choose one"
            )
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            legal = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
            raise ConfigError(
                f"model.num_kv_heads={num_kv_heads}: must divide model.num_heads={num_heads}; try one of {legal}"
            )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.check_position(position)
        self.position, self.layer_index = position, layer_index
        self.q_proj = Linear(d_model, num_heads * head_dim, bias=False)
        self.k_proj = Linear(d_model, num_kv_heads * head_dim, bias=False)
        self.v_proj = Linear(d_model, num_kv_heads * head_dim, bias=False)
        self.o_proj = Linear(num_heads * head_dim, d_model, bias=False)
        self.q_norm = RMSNorm(dim=head_dim, eps=QK_NORM_EPS) if qk_norm else None
        self.k_norm = RMSNorm(dim=head_dim, eps=QK_NORM_EPS) if qk_norm else None
        self.key_norm = key_norm
        self.scale = 1.0 if key_norm else head_dim**-0.5

    @abstractmethod
    def check_position(self, position: Position) -> None:
        """Raise ConfigError, with the reason, for a position that has no meaning under this attention."""

    def forward(
        self,
        x: Float[Tensor, "batch time d_model"],
        *,
        positions: Int[Tensor, "batch time"],
        document_ids: Int[Tensor, "batch time"] | None,
        cache: LayerCache | None = None,
    ) -> SublayerOutput:
        """Attend. `document_ids=None` says that every row is one document."""
        q, k, v = self.project(x)
        mixed, losses, metrics = self.attend(q, k, v, positions=positions, document_ids=document_ids, cache=cache)
        return SublayerOutput(hidden=self.o_proj(mixed.flatten(2)), losses=losses, metrics=metrics)

    def project(self, x: Float[Tensor, "batch time d_model"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [batch time heads head_dim] and k, v [batch time kv_heads head_dim]."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.key_norm:
            k = F.normalize(k.float(), dim=-1, eps=QK_NORM_EPS).to(k.dtype)
        return q, k, v

    @abstractmethod
    def attend(
        self,
        q: Float[Tensor, "batch time heads head_dim"],
        k: Float[Tensor, "batch time kv_heads head_dim"],
        v: Float[Tensor, "batch time kv_heads head_dim"],
        *,
        positions: Int[Tensor, "batch time"],
        document_ids: Int[Tensor, "batch time"] | None,
        cache: Any,
    ) -> tuple[Float[Tensor, "batch time heads head_dim"], dict[str, Tensor], dict[str, Tensor]]:
        """Place queries and keys with `self.position` and mix the values; return them, losses and metrics."""

    @abstractmethod
    def pair_weights(
        self,
        q: Float[Tensor, "batch time heads head_dim"],
        k: Float[Tensor, "batch time kv_heads head_dim"],
        *,
        positions: Int[Tensor, "batch time"],
        document_ids: Int[Tensor, "batch time"] | None,
    ) -> Float[Tensor, "batch heads time time"]:
        """The weight of every value for every token, all in memory: the definition of what `attend` mixes by."""

    def reference_attend(
        self,
        q: Float[Tensor, "batch time heads head_dim"],
        k: Float[Tensor, "batch time kv_heads head_dim"],
        v: Float[Tensor, "batch time kv_heads head_dim"],
        *,
        positions: Int[Tensor, "batch time"],
        document_ids: Int[Tensor, "batch time"] | None,
    ) -> Float[Tensor, "batch time heads head_dim"]:
        """The definition of what `attend` mixes, with time x time memory; tests compare the two."""
        weights = self.pair_weights(q, k, positions=positions, document_ids=document_ids)
        values = v.to(weights.dtype).repeat_interleave(self.num_heads // self.num_kv_heads, dim=2)
        return torch.einsum("bhij,bjhd->bihd", weights, values).to(v.dtype)

    @abstractmethod
    def mixing_flops_per_token(self, context_length: int) -> float:
        """Forward FLOPs a token of the mixing itself, averaged over a window of context_length tokens."""

    def new_cache(self, *, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> LayerCache:
        """Return an empty cache for decoding up to max_length tokens; kinds with a running state override this."""
        return KeyValueCache(batch=batch, max_length=max_length, device=device, dtype=dtype)

    def flops_per_token(self, context_length: int) -> float:
        """Forward FLOPs a token: projections, two for each weight, and the mixing."""
        projections = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        return 2.0 * sum(p.weight.numel() for p in projections) + self.mixing_flops_per_token(context_length)
