"""Causal softmax attention."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from llm.attention.base import Attention
from llm.attention.kernels import causal_attention
from llm.contracts import PositionView
from llm.errors import ConfigError


class SoftmaxAttention(Attention):
    """Causal attention with grouped-query heads: o_i = Σ_{j≤i} softmax_j(q_i·k_j / sqrt(head_dim)) v_j.

    Runs on the best kernel at hand (see `llm.attention.kernels`) and never holds a time x time matrix.

    Source: Vaswani et al., "Attention Is All You Need", arXiv:1706.03762, eq. 1.
    """

    def attend(
        self,
        views: tuple[PositionView, ...],
        v: Float[Tensor, "batch time kv_heads head_dim"],
        *,
        positions: Int[Tensor, "batch time"],
        document_ids: Int[Tensor, "batch time"] | None,
        cache: Any,
    ) -> tuple[Float[Tensor, "batch time heads head_dim"], dict[str, Tensor], dict[str, Tensor]]:
        """Mix values by the softmax of scores."""
        if len(views) != 1:
            raise ConfigError(f"model.position: gives {len(views)} views; model.attention=softmax takes one")
        if cache is not None:
            views, v, document_ids = cache.append(views, v, document_ids)
        (view,) = views
        mixed = causal_attention(view.q, view.k, v, document_ids=document_ids, scale=self.head_dim**-0.5)
        return mixed, {}, {}

    def mixing_flops_per_token(self, context_length: int) -> float:
        """Scores and values over the mean number of visible keys, (context_length + 1) / 2."""
        return 4.0 * self.num_heads * self.head_dim * (context_length + 1) / 2
