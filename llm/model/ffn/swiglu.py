"""Defines the dense feed-forward layer."""

from jaxtyping import Float
from torch import Tensor, nn

from llm.contracts import SublayerOutput
from llm.errors import ConfigError
from llm.model.ffn.activation import Activation, largest_size, read_caps
from llm.ops.linear_layer import biased_linear
from llm.ops.situ import gated_units


class SwiGLU(nn.Module):
    """A gated feed-forward: y = W_down (silu(W_gate x) ⊙ W_up x).

    Args:
        d_model: width of the residual stream.
        d_ff: hidden width.
        activation: swiglu, or situ for b₁ tanh(g/b₁) σ(g) ⊙ b₂ tanh(u/b₂), whose units are at most b₁ b₂.
        gate_cap: b₁ of situ, above 0; None for 4.
        up_cap: b₂ of situ, above 0; None for 25.
        bias: add a bias, which starts at zero, to each projection.

    Raises:
        ConfigError: d_ff is below 1, or a cap is not above 0 or without situ.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202, eq. 6; SiTU-GLU of Su Jianlin,
    kexue.fm/archives/11848.
    """

    def __init__(
        self,
        *,
        d_model: int,
        d_ff: int,
        activation: Activation = "swiglu",
        gate_cap: float | None = None,
        up_cap: float | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.caps = read_caps(activation, gate_cap=gate_cap, up_cap=up_cap)
        if d_ff < 1:
            raise ConfigError(f"model.ffn.d_ff={d_ff}: must be at least 1; 8/3 x d_model={8 * d_model // 3} is usual")
        self.has_bias = bias
        self.gate_proj = biased_linear(d_model, d_ff, bias=bias)
        self.up_proj = biased_linear(d_model, d_ff, bias=bias)
        self.down_proj = biased_linear(d_ff, d_model, bias=bias)

    def forward(self, x: Float[Tensor, "batch time d_model"]) -> SublayerOutput:
        units = gated_units(self.gate_proj(x), self.up_proj(x), self.caps)
        is_logged = self.training and self.caps is not None
        metrics = {"hidden_max": largest_size(units)} if is_logged else {}
        return SublayerOutput(hidden=self.down_proj(units), losses={}, metrics=metrics)

    def flops_per_token(self, context_length: int) -> float:
        """Return forward FLOPs per token: two per weight."""
        return 2.0 * sum(weight.numel() for weight in self.parameters() if weight.ndim >= 2)
