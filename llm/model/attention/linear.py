"""Linear attention: a feature map in place of the softmax, so that one matrix per head stores the past."""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm.contracts import CAUSAL, AttentionGeometry, LayerCache, Sight
from llm.errors import ConfigError
from llm.model.attention.attention_layer import QK_NORM_EPS
from llm.model.attention.kernels.reference import visible_keys
from llm.model.attention.linear_chunks import chunked_linear
from llm.model.attention.recurrent import RecurrentAttention
from llm.model.attention.short_convolution import TokenGate, keep_start
from llm.model.attention.states import StateCache
from llm.model.norm import RMSNorm
from llm.model.position.position_module import Position

FeatureMap = Literal["elu", "softmax", "relu", "identity"]
POSITIVE_MAPS = ("elu", "softmax")
"""Maps with features above 0, so that the sum of weights is above 0."""


def features(x: Tensor, feature_map: FeatureMap) -> Tensor:
    """Return φ(x) in fp32 (fp64 for fp64): elu(x) + 1, softmax over the head's axis, relu(x), or x."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if feature_map == "elu":
        return F.elu(x) + 1
    if feature_map == "softmax":
        return x.softmax(-1)
    return x.relu() if feature_map == "relu" else x


class LinearAttention(RecurrentAttention):
    """Weighs values by φ(q)·φ(k): time and memory grow linearly, and decoding holds one state whatever the length.

        S_i = γ S_{i−1} + φ(k_i) v_iᵀ,   z_i = γ z_{i−1} + φ(k_i)
        o_i = φ(q_i)ᵀ S_i / φ(q_i)ᵀ z_i,   with output_norm: o_i = RMSNorm(φ(q_i)ᵀ S_i)

    A rotary position rotates φ(q) and φ(k) in the numerator alone: the sum of weights must stay positive.

    Args:
        geometry, position, layer_index, qk_norm, key_norm, qk_norm_eps: see `Attention`.
        feature_map: φ: elu (elu(x) + 1) | softmax | relu | identity.
        decay: γ of each key/value head: none (1), fixed (1 − 2^(−5−h), h from 0 to 3 over the heads), or learned from
            that start, or token: γ_i = exp(−softplus(W x_i + b)) for each token, with b at that start.
        conv: taps of a causal convolution and silu on queries, keys and values before the feature map; 0 for none.
        output_norm: normalize the output of each head instead of dividing by the sum of weights; relu and identity
            require it.
        chunk_size: tokens that are computed as one product in training; the result does not depend on it.

    Raises:
        ConfigError: the position has two views or scales queries, or the sum of weights may be 0.

    Source: Katharopoulos et al., "Transformers are RNNs", arXiv:2006.16236, eq. 7-10 and 16-20; decay and output norm
    of Sun et al., "Retentive Network", arXiv:2307.08621, eq. 8; decay per token of Yang et al.,
    arXiv:2312.06635; rotary numerators of arXiv:2104.09864, eq. 19.
    Differs: states reset where a document ends; RMSNorm replaces RetNet's group norm, without its gate.
    """

    option = "linear"
    why_causal = "model.attention=linear sums only what came before a token"
    parameter_kinds: ClassVar = {"decay_logit": "vector"}

    def __init__(
        self,
        *,
        geometry: AttentionGeometry,
        position: Position,
        layer_index: int,
        qk_norm: bool,
        key_norm: bool,
        feature_map: FeatureMap,
        decay: Literal["none", "fixed", "learned", "token"],
        output_norm: bool,
        chunk_size: int,
        qk_norm_eps: float = QK_NORM_EPS,
        conv: int = 0,
    ) -> None:
        super().__init__(
            geometry=geometry,
            position=position,
            layer_index=layer_index,
            qk_norm=qk_norm,
            key_norm=key_norm,
            qk_norm_eps=qk_norm_eps,
        )
        if not output_norm and feature_map not in POSITIVE_MAPS:
            raise ConfigError(
                f"model.attention.feature_map={feature_map}: the sum of its weights may be 0; set "
                f"model.attention.output_norm=true, or a positive map, {' or '.join(POSITIVE_MAPS)}"
            )
        if chunk_size < 1:
            raise ConfigError(f"model.attention.chunk_size={chunk_size}: must be at least 1; 64 is fast")
        self.feature_map: FeatureMap = feature_map
        self.chunk_size = chunk_size
        self.out_norm = RMSNorm(dim=geometry.head_dim, eps=QK_NORM_EPS) if output_norm else None
        logits = decay_logits(geometry.num_kv_heads)
        self.decay_logit = nn.Parameter(logits) if decay == "learned" else None
        self.register_buffer("fixed_decay_logit", logits if decay == "fixed" else None, persistent=False)
        start = keep_start(geometry.num_kv_heads)
        self.keep_gate = TokenGate(d_model=geometry.d_model, start=start) if decay == "token" else None
        self.add_convolution(conv)

    def gates(self, x: Float[Tensor, "batch time d_model"]) -> dict[str, Tensor]:
        """Return the log decay of each token, where decays are per token."""
        return {} if self.keep_gate is None else {"log_keep": -F.softplus(self.keep_gate(x))}

    def check_position(self, position: Position) -> None:
        """Accept positions with one view that do not scale queries."""
        super().check_position(position)
        if position.scales_queries:
            raise ConfigError(
                f"model.position.log_n={position.log_n.mode}: model.attention=linear has no softmax, so a "
                "scale of the query cancels; use model.position.log_n=none"
            )
        if position.amplitude != 1:
            raise ConfigError(
                f"model.position.attention_factor={position.amplitude:.6g}: model.attention=linear has no softmax, "
                "so this factor would scale the output; set model.position.attention_factor=1.0"
            )

    fixed_decay_logit: Tensor | None

    @property
    def log_decay(self) -> Tensor | None:
        """The log of γ per key/value head, or None without decay."""
        logit = self.fixed_decay_logit if self.decay_logit is None else self.decay_logit
        return None if logit is None else F.logsigmoid(logit.float())

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, ids: Tensor, cache: StateCache, **gates: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mix values, and sum weights where there is no output norm; see `RecurrentAttention`."""
        phi_q, phi_k = features(q, self.feature_map), features(k, self.feature_map)
        (view,) = self.position(phi_q, phi_k, positions)
        options: dict[str, Any] = {
            "document_ids": ids,
            "log_decay": gates.get("log_keep", self.log_decay),
            "chunk_size": self.chunk_size,
            "before": cache.document,
        }
        mixed, values = chunked_linear(view.q, view.k, v.to(phi_q.dtype), initial=cache.states["values"], **options)
        if self.out_norm is not None:
            return self.out_norm(mixed), {"values": values}
        ones = torch.ones_like(v[..., :1], dtype=phi_q.dtype)
        total, weights = chunked_linear(phi_q, phi_k, ones, initial=cache.states["weights"], **options)
        return mixed / total, {"values": values, "weights": weights}

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
        """Return φ(q)·φ(k) with decay, divided by its sum where there is no output norm; see `Attention`."""
        phi_q, phi_k = features(q, self.feature_map), features(k, self.feature_map)
        (view,) = self.position(phi_q, phi_k, positions)
        group, time = self.num_heads // self.num_kv_heads, q.shape[1]
        places = torch.arange(time, device=q.device)
        if "log_keep" in gates:
            sums = gates["log_keep"].cumsum(1).repeat_interleave(group, dim=2).movedim(2, 1)
            factor = torch.exp((sums[..., :, None] - sums[..., None, :]).clamp_max(0))
        else:
            log_decay = phi_q.new_zeros(self.num_kv_heads) if self.log_decay is None else self.log_decay
            distance = (places[:, None] - places).clamp_min(0)
            factor = torch.exp(log_decay.repeat_interleave(group)[:, None, None] * distance)
        visible = visible_keys(time=time, time_k=time, device=q.device, document_ids=document_ids, window=None)
        factor = factor * visible[:, None]
        weights = torch.einsum("bihd,bjhd->bhij", view.q, view.k.repeat_interleave(group, dim=2)) * factor
        if self.out_norm is not None:
            return weights
        plain = torch.einsum("bihd,bjhd->bhij", phi_q, phi_k.repeat_interleave(group, dim=2)) * factor
        return weights / plain.sum(-1, keepdim=True)

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
        """Mix as in `Attention`, and apply the output norm where `attend` does."""
        keys: dict[str, Any] = {"positions": positions, "document_ids": document_ids, "sight": sight, **gates}
        mixed = super().reference_attend(q, k, v, **keys)
        return mixed if self.out_norm is None else self.out_norm(mixed)

    def new_cache(self, *, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> LayerCache:
        """Return empty states: one fp32 matrix per key/value head, of the same size at any max_length."""
        state_dtype = torch.promote_types(dtype, torch.float32)
        shapes = {"values": self.head_dim} | ({} if self.out_norm is not None else {"weights": 1})
        states = {
            name: torch.zeros(batch, self.num_kv_heads, self.head_dim, width, dtype=state_dtype, device=device)
            for name, width in shapes.items()
        }
        tail = self.empty_tail(batch=batch, device=device, dtype=dtype)
        return StateCache(batch=batch, states=states, device=device, tail=tail)

    def mixing_flops_per_token(self, context_length: int, sight: Sight = CAUSAL) -> float:
        """Count products inside a chunk (half of them masked) and products with the state."""
        chunk = min(self.chunk_size, context_length)
        inside = 2.0 * self.num_heads * chunk * 2 * self.head_dim
        return inside + 4.0 * self.num_heads * self.head_dim * self.head_dim


def decay_logits(num_kv_heads: int) -> Float[Tensor, " kv_heads"]:
    """Return the logits of decays 1 − 2^(−5−h), h spread from 0 to 3 over the heads."""
    exponents = 5 + torch.linspace(0, 3, num_kv_heads, dtype=torch.float64, device="cpu")
    return torch.logit(1 - 2.0**-exponents).float()
