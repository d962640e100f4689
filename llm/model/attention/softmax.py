"""Softmax attention."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from llm.contracts import CAUSAL, AttentionGeometry, Sight
from llm.errors import ConfigError
from llm.model.attention.attention_layer import QK_NORM_EPS, Attention, Bias
from llm.model.attention.kernels import sighted_attention
from llm.model.attention.kernels.reference import visible_keys
from llm.model.attention.views import attend_views, pair_scores, softmax_weights
from llm.model.position.position_module import Position


class SoftmaxAttention(Attention):
    """Causal attention with grouped-query heads: o_i = Σ_{j≤i} softmax_j(q_i·k_j / sqrt(head_dim)) v_j.

    Under another sight the sum runs over the keys that it shows.
    It runs on the fastest available kernel (see `llm.model.attention.kernels`). Positions that score near and far
    pairs differently take two passes (see `llm.model.attention.views`).

    Args:
        window: number of keys that a query sees, itself included, at least 1; None for all. A two-sided query sees
            keys at a distance below it.
        shared_kv: use keys as values. A position that turns values lets the cache hold one tensor for both.
        geometry, position, layer_index, qk_norm, key_norm, qk_norm_eps, bias: see `Attention`.

    Raises:
        ConfigError: window is below 1.

    Source: Vaswani et al., "Attention Is All You Need", arXiv:1706.03762, eq. 1; windows of arXiv:2004.05150; shared
    keys and values of Su Jianlin, kexue.fm/archives/10907 and 11111.
    """

    def __init__(
        self,
        *,
        geometry: AttentionGeometry,
        position: Position,
        layer_index: int,
        qk_norm: bool,
        key_norm: bool,
        window: int | None,
        qk_norm_eps: float = QK_NORM_EPS,
        shared_kv: bool = False,
        bias: Bias = "none",
    ) -> None:
        if window is not None and window < 1:
            raise ConfigError(f"model.attention.window={window}: must be at least 1, or null for all; try 256")
        super().__init__(
            geometry=geometry,
            position=position,
            layer_index=layer_index,
            qk_norm=qk_norm,
            key_norm=key_norm,
            qk_norm_eps=qk_norm_eps,
            shared_kv=shared_kv,
            bias=bias,
        )
        self.window, self.shared_kv, self.bias = window, shared_kv, bias

    measures_logits: bool = False
    """Whether training returns the largest log-sum-exp of each head; `llm.optim.qk_clip` sets it."""

    def check_position(self, position: Position) -> None:
        """Accept every position."""

    def check_sight(self, sight: Sight) -> None:
        """Refuse a position that serves causal attention alone, and a window under a sight with blocks."""
        if sight.kind == "causal":
            return
        if reason := self.position.why_one_sided():
            name = type(self.position).__name__
            raise ConfigError(f"model.position={name}: {reason}; use model/position=rope with log_n=none")
        if sight.kind != "bidirectional" and self.window is not None:
            raise ConfigError(
                f"model.attention.window={self.window}: a window cuts through blocks; set model.attention.window=null"
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
        """Mix values by the softmax of scores."""
        views = self.position(q, k, positions)
        values = None if self.stores_one_tensor else self.position.turn(v, positions) if self.turns_values else v
        if cache is not None:
            views, values, document_ids = cache.append(views, values, document_ids)
        values = views[0].k if values is None else values
        measures = self.measures_logits and self.training and cache is None
        options: dict[str, Any] = {"document_ids": document_ids, "scale": self.scale, "window": self.window}
        options["return_lse"] = measures
        if sight == CAUSAL:
            found = attend_views(views, values, **options)
        else:
            found = sighted_attention(views[0].q, views[0].k, values, sight=sight, positions=positions, **options)
        mixed, lse = found if isinstance(found, tuple) else (found, None)
        metrics = {} if lse is None else {"peak/logit": lse.detach().amax((0, 1))}
        return self.position.turn_back(mixed, positions) if self.turns_values else mixed, {}, metrics

    def logit_factors(self, factors: Float[Tensor, " heads"]) -> dict[str, Tensor]:
        """Return factors on weights that multiply the logits of each head by `factors`; see `LogitMeter`.

        The query takes a head's whole factor where its key is shared with other heads, is normalized, or is a value.
        Gains of query and key norms belong to all heads, which then take the smallest factor.
        """
        if self.q_norm is not None:
            root = factors.amin().sqrt()[None]
            return {"q_norm.weight": root, "k_norm.weight": root}
        if self.num_kv_heads < self.num_heads or self.key_norm or self.shared_kv:
            return {"q_proj.weight": factors}
        return {"q_proj.weight": factors.sqrt(), "k_proj.weight": factors.sqrt()}

    @property
    def turns_values(self) -> bool:
        """Whether values are turned by their positions, and outputs back."""
        return self.position.turns_values

    @property
    def stores_one_tensor(self) -> bool:
        """Whether the keys that are scored are the values as well, so that a cache holds them once."""
        return self.shared_kv and (self.turns_values or self.position.bare_keys_from == 0)

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
        """Mix as in `Attention`, values turned and outputs turned back where the position does so."""
        keys: dict[str, Any] = {"positions": positions, "document_ids": document_ids, "sight": sight}
        if not self.turns_values:
            return super().reference_attend(q, k, v, **keys)
        return self.position.turn_back(
            super().reference_attend(q, k, self.position.turn(v, positions), **keys), positions
        )

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
        """Return the softmax of all scores; see `Attention`."""
        time = q.shape[1]
        scores = pair_scores(self.position(q, k, positions)) * self.scale
        sizes = {"time": time, "time_k": time, "device": q.device, "window": self.window}
        visible = visible_keys(**sizes, document_ids=document_ids, sight=sight, positions=positions)
        return softmax_weights(scores, visible).flatten(1, 2)

    def mixing_flops_per_token(self, context_length: int, sight: Sight = CAUSAL) -> float:
        """Count scores and values over the mean number of visible keys, (context_length + 1) / 2 without a window.

        A bidirectional query sees context_length keys without a window. A pair of copies sees context_length +
        block_length keys per clean token, half of them from each copy.
        """
        return 4.0 * self.num_heads * self.head_dim * self._mean_keys(context_length, sight)

    def _mean_keys(self, context_length: int, sight: Sight) -> float:
        """Return the number of keys that the queries of one clean token see, averaged over a window of one document."""
        if sight.kind in ("block", "block_pair"):
            pair = context_length + min(sight.block_length, context_length)
            return pair if sight.kind == "block_pair" else pair / 2
        reach = context_length if self.window is None else min(self.window, context_length)
        one_sided = reach - reach * (reach - 1) / (2 * context_length)
        return one_sided if sight.kind == "causal" else 2 * one_sided - 1
