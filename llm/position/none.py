"""No position signal beyond the causal order."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from llm.contracts import PositionView


class NoPosition(nn.Module):
    """Leaves queries and keys as they are; the causal mask alone tells order.

    Source: Haviv et al., "Transformer Language Models without Positional Encodings Still Learn Positional
    Information", arXiv:2203.16634.
    """

    def __init__(self, *, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(
        self,
        q: Float[Tensor, "batch time heads head_dim"],
        k: Float[Tensor, "batch time kv_heads head_dim"],
        positions: Int[Tensor, "batch time"],
    ) -> tuple[PositionView, ...]:
        return (PositionView(q=q, k=k, min_distance=0),)
