"""The gradients between the backward pass and the update, where the parameters are whole."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class WholeGradients:
    """Measures, clips and drops the gradients of whole parameters, before any update rule.

    Args:
        parameters: those that may have gradients.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.grad is not None]

    @property
    def exist(self) -> bool:
        """Whether there are gradients: an optimizer may have folded them into its momentum already."""
        return bool(self._parameters)

    def norm(self) -> Tensor:
        """2-norm of the whole gradient."""
        return torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])

    def clip(self, max_norm: float, norm: Tensor) -> None:
        """Scale the gradients so that their norm is at most `max_norm`."""
        torch.nn.utils.clip_grads_with_norm_(self._parameters, max_norm, norm)

    def drop(self) -> None:
        """Forget the gradients, so that the coming step updates nothing."""
        for parameter in self._parameters:
            parameter.grad = None
