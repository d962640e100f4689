"""A short causal convolution over the tokens of a document, and gates that are computed from each token."""

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm.errors import ConfigError

TAP_NOISE = 0.02
"""Standard deviation at the start of the taps before the token itself, whose own tap is 1."""


class Tail(NamedTuple):
    """The last inputs of a convolution, which the next tokens read; documents are −1 before a text."""

    inputs: Float[Tensor, "batch before channels"]
    documents: Int[Tensor, "batch before"]

    @classmethod
    def empty(cls, *, batch: int, before: int, channels: int, device: torch.device, dtype: torch.dtype) -> "Tail":
        """Return the tail of an empty text."""
        documents = torch.full((batch, before), -1, dtype=torch.long, device=device)
        return cls(torch.zeros(batch, before, channels, dtype=dtype, device=device), documents)


class ShortConvolution(nn.Module):
    """A causal convolution of each channel within its document, followed by silu.

        y_i = silu(Σ_{t<taps} a_t x_{i−t}),   without the tokens of other documents

    Args:
        channels: number of channels.
        taps: tokens that an output reads, itself included, at least 2.

    Source: Su Jianlin, kexue.fm/archives/11320; Yang et al., "Gated Delta Networks", arXiv:2412.06464, section 3.4.
    """

    parameter_kinds: ClassVar = {"taps": "vector"}

    def __init__(self, *, channels: int, taps: int) -> None:
        super().__init__()
        self.channels, self.num_taps = channels, taps
        start = TAP_NOISE * torch.randn(channels, taps)
        start[:, 0] = 1.0
        self.taps = nn.Parameter(start.flatten())

    def forward(
        self, x: Float[Tensor, "batch time channels"], document_ids: Int[Tensor, "batch time"], tail: Tail
    ) -> tuple[Float[Tensor, "batch time channels"], Tail]:
        """Return the outputs, and the tail that the next tokens need."""
        taps = self.taps.view(self.channels, self.num_taps).to(x.dtype)
        before, time = self.num_taps - 1, x.shape[1]
        inputs = torch.cat((tail.inputs.to(x.dtype), x), dim=1)
        documents = torch.cat((tail.documents, document_ids), dim=1)
        total = x * taps[:, 0]
        for back in range(1, self.num_taps):
            span = slice(before - back, before - back + time)
            same = (documents[:, span] == document_ids)[..., None]
            total = total + torch.where(same, inputs[:, span], 0.0) * taps[:, back]
        return F.silu(total), Tail(inputs[:, time:].detach(), documents[:, time:])


class TokenGate(nn.Module):
    """A projection of each token to the logits of its gates, computed in fp32 because a state multiplies many of them.

    Args:
        d_model: width of the residual stream.
        start: bias at the start, one per gate.
    """

    parameter_kinds: ClassVar = {"weight": "vector", "bias": "vector"}

    def __init__(self, *, d_model: int, start: Float[Tensor, " gates"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(len(start), d_model).normal_(0.0, d_model**-0.5))
        self.bias = nn.Parameter(start.float().clone())

    def forward(self, x: Float[Tensor, "batch time d_model"]) -> Float[Tensor, "batch time gates"]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


def keep_start(num_kv_heads: int) -> Float[Tensor, " kv_heads"]:
    """Return biases b with exp(−softplus(b)) = 1 − 2^(−5−h), h spread from 0 to 3 over the heads."""
    kept = 1 - 2.0 ** -(5 + torch.linspace(0, 3, num_kv_heads, dtype=torch.float64, device="cpu"))
    return torch.log(torch.expm1(-kept.log())).float()


def check_taps(conv: int) -> int:
    """Return the number of taps, or raise ConfigError where it is 1 or below 0."""
    if conv < 0 or conv == 1:
        raise ConfigError(
            f"model.attention.conv={conv}: must be 0 for none, or at least 2: one tap reads no other token; 4 is usual"
        )
    return conv
