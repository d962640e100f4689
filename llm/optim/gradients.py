"""The gradients between the backward pass and the update, where the parameters are whole; which of them there are."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llm.errors import ConfigError


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


class FirstGradients:
    """Notes which trained parameters the first backward pass reaches, so that one that no loss depends on is named.

    One device leaves such a parameter where it is. DDP waits for its gradient, and ZeRO makes one of zeros, with which
    weight decay and momentum move it: several devices would train something else.

    Args:
        model: whose parameters are watched, until `check` is called.
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
        """Stop watching; refuse what no rank has reached.

        Args:
            total: sums over the ranks; called by all of them together.

        Raises:
            ConfigError: parameters without a gradient, by name.
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
