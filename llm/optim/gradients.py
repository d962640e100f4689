"""Operations on gradients between the backward pass and the update, and a check that every parameter has one."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llm.errors import ConfigError


class WholeGradients:
    """The gradients of unsharded parameters, which can be measured, clipped and discarded before the update.

    Args:
        parameters: parameters that may have gradients.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.grad is not None]

    @property
    def exist(self) -> bool:
        """Whether any gradient exists. An optimizer may already have added all gradients to its momentum."""
        return bool(self._parameters)

    def norm(self) -> Tensor:
        """Return the 2-norm of all gradients together."""
        return torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])

    def clip(self, max_norm: float, norm: Tensor) -> None:
        """Scale the gradients so that their norm is at most `max_norm`."""
        torch.nn.utils.clip_grads_with_norm_(self._parameters, max_norm, norm)

    def clip_finite(self, max_norm: float) -> None:
        """Scale the gradients of the tensors that are finite by the norm of these tensors together.

        Other tensors keep their gradients. Tiger shrinks such tensors, and its momentum takes the finite gradients.
        """
        finite = WholeGradients(parameter for parameter in self._parameters if _is_finite(parameter.grad))
        finite.clip(max_norm, finite.norm())

    def drop(self) -> None:
        """Discard the gradients, so that the next step updates nothing."""
        for parameter in self._parameters:
            parameter.grad = None


class FirstGradients:
    """A record of the trainable parameters that the first backward pass reaches; those without a gradient are refused.

    A single device does not update such a parameter. DDP waits for its gradient. ZeRO gives it a zero gradient, so that
    weight decay and momentum change it. Training on several devices would then differ from training on one.

    Args:
        model: model whose parameters are observed until `check` is called.
    """

    def __init__(self, model: nn.Module) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._reached = dict.fromkeys(named, 0.0)
        self._hooks = [p.register_post_accumulate_grad_hook(self._noting(name)) for name, p in named.items()]

    def _noting(self, name: str) -> Callable[[Any], None]:
        def note(_: Any) -> None:
            self._reached[name] = 1.0

        return note

    def check(self, total: Callable[[Tensor], Tensor]) -> None:
        """Remove the hooks, and raise an error for parameters that no rank has reached.

        Args:
            total: function that sums a tensor over the ranks; all ranks must call it together.

        Raises:
            ConfigError: if a parameter has no gradient; the message names it.
        """
        for hook in self._hooks:
            hook.remove()
        counts = total(torch.tensor(list(self._reached.values()))).tolist()
        idle = [name for name, count in zip(self._reached, counts, strict=True) if not count]
        if idle:
            raise ConfigError(
                f"model.{idle[0]}: no loss depends on it ({len(idle)} such parameters), and several devices would move "
                "what one device leaves alone; have the model use it, freeze it with requires_grad_(False), or train "
                "on one device"
            )


def _is_finite(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(torch.isfinite(torch.linalg.vector_norm(gradient, ord=float("inf"))))
