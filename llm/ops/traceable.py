"""Operators that cost a function call in eager mode and are one node of a traced graph.

Each call of an operator of `torch.library` runs a dozen Python functions. In eager mode a `TraceableOp` is therefore an
autograd function, and its operator serves torch.compile, fake tensors, the meta device and dispatch modes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PLAIN = (Tensor, torch.nn.Parameter)


class TraceableOp:
    """A function of tensors with the methods of an operator of `torch.library`, fast in eager mode.

    Args:
        function: computes the outputs, which share no memory with the inputs; gradients are not recorded in it.
        name: `namespace::name` of the operator.
        schema: its signature; None to infer it from the annotations.
    """

    def __init__(self, function: Callable[..., Any], *, name: str, schema: str | None) -> None:
        self.operator = torch.library.custom_op(name, function, mutates_args=(), schema=schema)
        self.eager: Callable[..., Any] = torch.no_grad()(function)
        self.__doc__ = function.__doc__

    def __call__(self, *inputs: Any) -> Any:
        """Return the outputs."""
        return self.operator(*inputs) if _is_traced(inputs) else self.eager(*inputs)

    def register_fake(self, empty: Callable[..., Any]) -> Callable[..., Any]:
        """Set the function that allocates the outputs; return it."""
        self.operator.register_fake(empty)
        return empty

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Set `backward(ctx, *grads)` and `setup_context(ctx, inputs, output)`, which saves tensors."""
        self.operator.register_autograd(backward, setup_context=setup_context)
        function = self.eager

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                output = function(*inputs)
                setup_context(ctx, inputs, output)
                return output

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
                return backward(ctx, *grads)

        self.eager = Eager.apply


def traceable_op(name: str, *, schema: str | None = None) -> Callable[[Callable[..., Any]], TraceableOp]:
    """Make a function a `TraceableOp`, as a decorator."""
    return lambda function: TraceableOp(function, name=name, schema=schema)


def _is_traced(inputs: tuple[Any, ...]) -> bool:
    """Return whether anything but plain eager execution sees the call."""
    if torch.compiler.is_compiling():
        return True
    modes: int = torch._C._len_torch_dispatch_stack()
    if modes or torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return True
    return any(isinstance(x, Tensor) and (type(x) not in PLAIN or x.is_meta) for x in inputs)
