"""Defines the base class of every attention: projections, query/key norm, positions, and the cache for decoding."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm.contracts import CAUSAL, AttentionGeometry, LayerCache, Sight, SublayerOutput
from llm.errors import ConfigError
from llm.model.attention.cache import KeyValueCache
from llm.model.factored import matrix_size, stacked_matrix
from llm.model.norm import RMSNorm
from llm.model.position.position_module import Position
from llm.ops.linear_layer import biased_linear

Bias = Literal["none", "qkv", "all"]

QK_NORM_EPS = 1e-6
"""Added to the mean square of a query or key before its root is taken; the value that Qwen3 and OLMo 2 use."""


class Attention(nn.Module, ABC):
    """An attention layer that projects to heads, mixes values in `attend`, and projects back.

    Args:
        geometry: dimensions of the layer.
        position: module called as `(q, k, positions) -> tuple[PositionView, ...]`, shared by all layers.
        layer_index: index of the layer, from 0.
        qk_norm: normalize queries and keys per head (RMSNorm with gain, arXiv:2302.05442), before positions.
        key_norm: score by q·k/‖k‖, without a gain and without head_dim^−1/2 (kexue.fm/archives/9859).
        qk_norm_eps: added to the mean square of queries and keys under qk_norm; the default serves a config.yaml
            without this key.
        shared_kv: whether values are the keys, so that there is no v_proj.
        bias: projections with a bias: none, qkv (Qwen2) or all; biases start at zero.

    Raises:
        ConfigError: num_kv_heads does not divide num_heads, this attention cannot use the position, or both norms
            are on.
    """

    window: int | None = None
    """Number of keys that a query sees, itself included; None for all."""

    why_causal: str = "model.attention reads only what comes before a token"
    """The reason why an attention serves the causal sight alone, for errors."""

    needs_bare_keys: bool = False
    """Whether far keys must be scored without their positions, also in training."""

    def __init__(
        self,
        *,
        geometry: AttentionGeometry,
        position: Position,
        layer_index: int,
        qk_norm: bool,
        key_norm: bool,
        qk_norm_eps: float = QK_NORM_EPS,
        shared_kv: bool = False,
        bias: Bias = "none",
    ) -> None:
        super().__init__()
        if qk_norm and key_norm:
            raise ConfigError(
                "model.attention.key_norm=true: model.attention.qk_norm already sets the keys' length; choose one"
            )
        heads, kv_heads, head_dim = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
        if kv_heads < 1 or heads % kv_heads:
            divisors = [n for n in range(1, heads + 1) if heads % n == 0]
            raise ConfigError(
                f"model.num_kv_heads={kv_heads}: must divide model.num_heads={heads}; try one of {divisors}"
            )
        self.num_heads, self.num_kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.check_position(position)
        self.position, self.layer_index = position, layer_index
        self.q_proj = biased_linear(geometry.d_model, heads * head_dim, bias=bias != "none")
        self.k_proj = biased_linear(geometry.d_model, kv_heads * head_dim, bias=bias != "none")
        self.v_proj = None if shared_kv else biased_linear(geometry.d_model, kv_heads * head_dim, bias=bias != "none")
        self.o_proj = biased_linear(heads * head_dim, geometry.d_model, bias=bias == "all")
        self.q_norm = RMSNorm(dim=head_dim, eps=qk_norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(dim=head_dim, eps=qk_norm_eps) if qk_norm else None
        self.key_norm = key_norm
        self.scale = 1.0 if key_norm else head_dim**-0.5

    @property
    def parameter_heads(self) -> Mapping[str, int]:
        """Heads per projection, negative where they are stacked along the input columns; see `HeadStack`."""
        stacks = {
            "q_proj": self.num_heads,
            "k_proj": self.num_kv_heads,
            "v_proj": self.num_kv_heads,
            "o_proj": -self.num_heads,
        }
        modules = {name: module for name in stacks if (module := getattr(self, name)) is not None}
        return {stacked_matrix(name, module, stacks[name]): stacks[name] for name, module in modules.items()}

    def cautions(self, *, context_length: int, is_training: bool) -> list[str]:
        """Return one line per setting of the position that cannot act as its name says; see `Position.cautions`."""
        lines = self.position.cautions(context_length=context_length, window=self.window, is_training=is_training)
        if is_training and self.position.is_for_evaluation and not self.needs_bare_keys:
            name = type(self.position).__name__
            lines.append(
                f"model.position={name}: a model trained with it does not read longer contexts; train with "
                "model/position=rope and choose it in eval.py"
            )
        return lines

    @abstractmethod
    def check_position(self, position: Position) -> None:
        """Raise ConfigError, with the reason, for a position that this attention cannot use."""

    def check_sight(self, sight: Sight) -> None:
        """Raise ConfigError, with the reason, for a sight other than causal; kinds that serve more override this."""
        if sight.kind != "causal":
            raise ConfigError(f"{self.why_causal}; use model/attention=softmax")

    def forward(
        self,
        x: Float[Tensor, "batch time d_model"],
        *,
        positions: Int[Tensor, "batch time"],
        document_ids: Int[Tensor, "batch time"] | None,
        cache: LayerCache | None = None,
        sight: Sight = CAUSAL,
    ) -> SublayerOutput:
        """Attend; `document_ids=None` means that every row is one document."""
        q, k, v = self.project(x, document_ids=document_ids, cache=cache)
        mixed, losses, metrics = self.attend(
            q, k, v, positions=positions, document_ids=document_ids, cache=cache, sight=sight, **self.gates(x)
        )
        return SublayerOutput(hidden=self.o_proj(mixed.flatten(2)), losses=losses, metrics=metrics)

    def gates(self, x: Float[Tensor, "batch time d_model"]) -> dict[str, Tensor]:
        """Return what `attend`, `pair_weights` and `reference_attend` get per token besides q, k and v, by name."""
        return {}

    def project(
        self,
        x: Float[Tensor, "batch time d_model"],
        *,
        document_ids: Int[Tensor, "batch time"] | None = None,
        cache: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [batch time heads head_dim] and k, v [batch time kv_heads head_dim]; v may be k.

        Kinds whose projections read earlier tokens of a document use `document_ids` and `cache`.
        """
        return self.to_heads(self.q_proj(x), self.k_proj(x), None if self.v_proj is None else self.v_proj(x))

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Cut projections into heads, and apply the norms of queries and keys."""
        q = q.unflatten(-1, (self.num_heads, self.head_dim))
        k = k.unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.key_norm:
            k = F.normalize(k.float(), dim=-1, eps=QK_NORM_EPS).to(k.dtype)
        return q, k, k if v is None else v.unflatten(-1, (self.num_kv_heads, self.head_dim))

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
        sight: Sight = CAUSAL,
        **gates: Tensor,
    ) -> tuple[Float[Tensor, "batch time heads head_dim"], dict[str, Tensor], dict[str, Tensor]]:
        """Apply `self.position` to queries and keys and mix the values; return mixed values, losses and metrics."""

    @abstractmethod
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
        """Return the weight of every value for every token: the slow definition of what `attend` mixes with."""

    def reference_attend(
        self,
        q: Float[Tensor, "batch time heads head_dim"],
        k: Float[Tensor, "batch time kv_heads head_dim"],
        v: Float[Tensor, "batch time kv_heads head_dim"],
        *,
        positions: Int[Tensor, "batch time"],
        document_ids: Int[Tensor, "batch time"] | None,
        sight: Sight = CAUSAL,
        **gates: Tensor,
    ) -> Float[Tensor, "batch time heads head_dim"]:
        """Mix values by `pair_weights`, in time x time memory; tests compare `attend` with it."""
        weights = self.pair_weights(q, k, positions=positions, document_ids=document_ids, sight=sight, **gates)
        values = v.to(weights.dtype).repeat_interleave(self.num_heads // self.num_kv_heads, dim=2)
        return torch.einsum("bhij,bjhd->bihd", weights, values).to(v.dtype)

    @abstractmethod
    def mixing_flops_per_token(self, context_length: int, sight: Sight = CAUSAL) -> float:
        """Return the forward FLOPs per clean token of mixing alone, averaged over a window of context_length tokens."""

    def new_cache(self, *, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> LayerCache:
        """Return an empty cache for decoding up to max_length tokens; attentions with a running state override this."""
        return KeyValueCache(batch=batch, max_length=max_length, device=device, dtype=dtype)

    def flops_per_token(self, context_length: int, sight: Sight = CAUSAL) -> float:
        """Return the forward FLOPs per clean token: two per weight of the projections, and the mixing."""
        projections = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        copies = 2 if sight.kind == "block_pair" else 1
        weights = sum(matrix_size(projection) for projection in projections if projection is not None)
        return 2.0 * copies * weights + self.mixing_flops_per_token(context_length, sight)
