"""Gated delta attention: a state that overwrites what a key held before, and forgets by token."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llm.contracts import CAUSAL, AttentionGeometry, LayerCache, Sight
from llm.errors import ConfigError
from llm.model.attention.attention_layer import QK_NORM_EPS
from llm.model.attention.delta_chunks import chunked_delta, recurrent_delta
from llm.model.attention.kernels.reference import visible_keys
from llm.model.attention.recurrent import RecurrentAttention
from llm.model.attention.short_convolution import TokenGate, keep_start
from llm.model.attention.states import StateCache
from llm.model.norm import RMSNorm
from llm.model.position.position_module import Position

LENGTH_EPS = 1e-6
"""Smallest length that a query or key is divided by."""
CHANNEL_FLOOR = 5.0
"""Largest decay of a channel per token, as a negative log, which bounds factors inside a chunk."""


class DeltaAttention(RecurrentAttention):
    """Linear attention by the gated delta rule: it recalls, overwrites and forgets, and decodes from one matrix a head.

        S_i = (I − w_i k_i k_iᵀ) Diag(e^{g_i}) S_{i−1} + w_i k_i v_iᵀ,   o_i = RMSNorm(S_iᵀ q_i),   ‖q_i‖ = ‖k_i‖ = 1
        w = σ(W_w x + b),   g = −softplus(W_g x + b) per head, or −5 σ(W_g x + b) per channel

    Args:
        geometry, position, layer_index: see `Attention`.
        qk_norm, key_norm: must be false: keys have unit length already.
        gate: head, channel, or none for g = 0 (DeltaNet).
        negative: w in (0, 2) instead of (0, 1), so that the state can change its sign.
        conv: taps of the causal convolution and silu on queries, keys and values; 0 for none.
        chunk_size: tokens that are computed as one product in training; the result does not depend on it.

    Raises:
        ConfigError: a norm of keys is on, the position has two views, turns values or scales queries, or a size is
            below 1.

    Source: Yang et al., "Gated Delta Networks", arXiv:2412.06464; channel gates of Kimi Linear, arXiv:2510.26692;
    negative eigenvalues of Grazzi et al., arXiv:2411.12537; Su Jianlin, kexue.fm/archives/11033 and 11486.
    Differs: states reset where a document ends; the output has a norm without a gate.
    """

    option = "delta"
    why_causal = "model.attention=delta writes a state from left to right"

    def __init__(
        self,
        *,
        geometry: AttentionGeometry,
        position: Position,
        layer_index: int,
        qk_norm: bool,
        key_norm: bool,
        gate: Literal["head", "channel", "none"],
        negative: bool,
        conv: int,
        chunk_size: int,
    ) -> None:
        if qk_norm or key_norm:
            key = "qk_norm" if qk_norm else "key_norm"
            raise ConfigError(
                f"model.attention.{key}=true: model.attention=delta gives queries and keys unit length; set it to false"
            )
        if chunk_size < 1:
            raise ConfigError(f"model.attention.chunk_size={chunk_size}: must be at least 1; 64 is fast")
        super().__init__(geometry=geometry, position=position, layer_index=layer_index, qk_norm=False, key_norm=False)
        self.gate, self.negative, self.chunk_size = gate, negative, chunk_size
        kv_heads, d_model = geometry.num_kv_heads, geometry.d_model
        self.write_gate = TokenGate(d_model=d_model, start=torch.zeros(kv_heads))
        self.keep_gate = None
        if gate != "none":
            self.keep_gate = TokenGate(d_model=d_model, start=gate_start(gate, kv_heads, geometry.head_dim))
        self.out_norm = RMSNorm(dim=geometry.head_dim, eps=QK_NORM_EPS)
        self.add_convolution(conv)

    def check_position(self, position: Position) -> None:
        """Accept positions with one view that scale no queries."""
        super().check_position(position)
        if position.scales_queries or position.amplitude != 1:
            key = f"log_n={position.log_n.mode}" if position.scales_queries else "attention_factor above 1"
            remedy = "log_n=none" if position.scales_queries else "attention_factor=1.0"
            raise ConfigError(
                f"model.position.{key}: model.attention=delta has no softmax, and needs keys of unit length; set "
                f"model.position.{remedy}"
            )

    def gates(self, x: Float[Tensor, "batch time d_model"]) -> dict[str, Tensor]:
        """Return the strength of writing [batch time kv_heads] and the log gate [batch time kv_heads features]."""
        write = self.write_gate(x).sigmoid() * (2.0 if self.negative else 1.0)
        if self.keep_gate is None:
            return {"write": write, "log_keep": torch.zeros_like(write)[..., None]}
        logits = self.keep_gate(x).unflatten(-1, (self.num_kv_heads, -1))
        log_keep = -F.softplus(logits) if self.gate == "head" else -CHANNEL_FLOOR * logits.sigmoid()
        return {"write": write, "log_keep": log_keep}

    def _placed(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys of unit length, turned by their positions, in at least fp32."""
        q, k = (F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=LENGTH_EPS) for x in (q, k))
        (view,) = self.position(q, k, positions)
        return view.q, view.k

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, ids: Tensor, cache: StateCache, **gates: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Write and read the state; single tokens skip the triangular solve. See `RecurrentAttention`."""
        q, k = self._placed(q, k, positions)
        inputs = (q, k, v.to(q.dtype), gates["write"].to(q.dtype), gates["log_keep"].to(q.dtype))
        options: dict[str, Any] = {
            "document_ids": ids, "initial": cache.states["values"].to(q.dtype), "before": cache.document,
        }  # fmt: skip
        if q.shape[1] == 1:
            mixed, state = recurrent_delta(*inputs, **options)
        else:
            mixed, state = chunked_delta(*inputs, **options, chunk_size=self.chunk_size)
        return self.out_norm(mixed), {"values": state}

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
        """Return (QKᵀ ⊙ Γ)(I + Diag(w)(KKᵀ ⊙ Γ⁻))⁻¹ Diag(w), which may be negative; see `Attention`."""
        q, k = (x.movedim(1, 2) for x in self._placed(q, k, positions))
        group, time = self.num_heads // self.num_kv_heads, q.shape[2]
        write, sums = gates["write"].to(q.dtype).movedim(1, 2), gates["log_keep"].to(q.dtype).cumsum(1).movedim(1, 2)
        visible = visible_keys(time=time, time_k=time, device=q.device, document_ids=document_ids, window=None)[:, None]
        between = (sums[:, :, :, None] - sums[:, :, None]).clamp_max(0).exp()  # [batch kv_heads time time features]
        scored = torch.einsum("bgnie,bgije->bgnij", q.unflatten(1, (-1, group)), k[:, :, None] * between)
        erased = torch.einsum("bgie,bgije->bgij", k, k[:, :, None] * between).tril(-1) * visible * write[..., None]
        eye = torch.eye(time, dtype=q.dtype, device=q.device)
        inverse = torch.linalg.solve_triangular(eye + erased, torch.diag_embed(write), upper=False)
        return ((scored * visible[:, :, None]) @ inverse[:, :, None]).flatten(1, 2)

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
        """Mix as in `Attention`, and apply the output norm."""
        keys: dict[str, Any] = {"positions": positions, "document_ids": document_ids, "sight": sight, **gates}
        return self.out_norm(super().reference_attend(q, k, v, **keys))

    def new_cache(self, *, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> LayerCache:
        """Return an empty state per key/value head in at least fp32, and the convolution's tail, at any length."""
        shape = (batch, self.num_kv_heads, self.head_dim, self.head_dim)
        state = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)
        tail = self.empty_tail(batch=batch, device=device, dtype=dtype)
        return StateCache(batch=batch, states={"values": state}, device=device, tail=tail)

    def mixing_flops_per_token(self, context_length: int, sight: Sight = CAUSAL) -> float:
        """Count products of keys, the solve (half of its entries are 0), products of queries, and those with the state.

        Per key/value head 4·C·D + 4·D², per query head 4·C·D + 2·D², with C tokens per chunk and D = head_dim.
        """
        size, chunk = self.head_dim, min(self.chunk_size, context_length)
        key_value = 4.0 * chunk * size + 4.0 * size * size
        return self.num_kv_heads * key_value + self.num_heads * (4.0 * chunk * size + 2.0 * size * size)


def gate_start(gate: Literal["head", "channel"], kv_heads: int, head_dim: int) -> Float[Tensor, " gates"]:
    """Return the biases under which e^g starts at 1 − 2^(−5−h), h spread from 0 to 3 over the heads."""
    if gate == "head":
        return keep_start(kv_heads)
    decay = F.softplus(keep_start(kv_heads).double())
    return torch.logit(decay / CHANNEL_FLOOR).float().repeat_interleave(head_dim)
