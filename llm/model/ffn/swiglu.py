"""Defines the dense feed-forward layer."""

from jaxtyping import Float
from torch import Tensor, nn

from llm.contracts import SublayerOutput
from llm.errors import ConfigError
from llm.ops.functional import swiglu
from llm.ops.linear_layer import Linear


class SwiGLU(nn.Module):
    """A gated feed-forward: y = W_down (silu(W_gate x) ⊙ W_up x).

    Args:
        d_model: width of the residual stream.
        d_ff: hidden width.

    Raises:
        ConfigError: d_ff is below 1.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202, eq. 6.
    """

    def __init__(self, *, d_model: int, d_ff: int) -> None:
        super().__init__()
        if d_ff < 1:
            raise ConfigError(f"model.ffn.d_ff={d_ff}: must be at least 1; 8/3 x d_model={8 * d_model // 3} is usual")
        self.gate_proj = Linear(d_model, d_ff, bias=False)
        self.up_proj = Linear(d_model, d_ff, bias=False)
        self.down_proj = Linear(d_ff, d_model, bias=False)

    def forward(self, x: Float[Tensor, "batch time d_model"]) -> SublayerOutput:
        hidden = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return SublayerOutput(hidden=hidden, losses={}, metrics={})

    def flops_per_token(self, context_length: int) -> float:
        """Return forward FLOPs per token: two per weight."""
        return 2.0 * sum(weight.numel() for weight in self.parameters())
