"""Defines how a trained decoder becomes a larger one."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from llm.errors import ConfigError
from llm.model.transformer import Transformer


@runtime_checkable
class Growth(Protocol):
    """Maps the weights of a trained decoder to those of a larger one."""

    @property
    def keeps_function(self) -> bool:
        """Whether the larger decoder computes the same at the start."""
        ...

    def __call__(self, source: Transformer, target: Transformer) -> dict[str, Tensor]:
        """Return the weights of `target` by name."""
        ...


def copied(name: str, tensor: Tensor, expected: Tensor, *, grow: str) -> Tensor:
    """Return a tensor that growth leaves as it is; raise ConfigError where the larger decoder has another shape."""
    if tensor.shape != expected.shape:
        raise ConfigError(
            f"grow={grow}: {name} is {tuple(tensor.shape)} in the trained run and {tuple(expected.shape)} here, and no "
            "rule grows it; keep that setting of model.* at its value in the run"
        )
    return tensor
