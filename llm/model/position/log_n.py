"""The log-n query scale: larger scores where more keys compete."""

import math
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from llm.errors import ConfigError

LogNMode = Literal["none", "clipped", "full"]


class LogN(nn.Module):
    """A scale on query i, which sees n = i + 1 keys; it keeps the entropy of attention level as the context grows.

        λ_n = log n / log train_length,   clipped: max(1, λ_n)

    `clipped` changes no position that training has seen: it is for evaluating a trained model at greater lengths.
    `full` is for a model that is trained with it.

    Args:
        mode: none | clipped | full.
        train_length: tokens per window in training, at least 2; null with mode none.

    Raises:
        ConfigError: a mode lacks its length, or a length is set without a mode.

    Source: Su Jianlin, kexue.fm/archives/8823; Chiang and Cholak, arXiv:2202.12172, section 5.3.
    Differs: the scale is divided by log train_length, as Su does, so that scores keep their size at that length.
    """

    def __init__(self, *, mode: LogNMode, train_length: int | None) -> None:
        super().__init__()
        if mode != "none" and (train_length is None or train_length < 2):
            raise ConfigError(
                f"model.position.train_length={train_length}: model.position.log_n={mode} needs the length that the "
                "model was trained at, at least 2; set it to the context_length of the training run"
            )
        if mode == "none" and train_length is not None:
            raise ConfigError(
                f"model.position.train_length={train_length}: only log_n reads it; set model.position.log_n=clipped or "
                "model.position.train_length=null"
            )
        self.mode, self.train_length = mode, train_length

    def forward(
        self, q: Float[Tensor, "batch time heads head_dim"], positions: Int[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time heads head_dim"]:
        if self.train_length is None:
            return q
        factor = (positions + 1).float().log() / math.log(self.train_length)
        if self.mode == "clipped":
            factor = factor.clamp_min(1.0)
        return q * factor[..., None, None].to(q.dtype)
