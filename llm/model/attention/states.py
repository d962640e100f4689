"""Running states of attentions that store no keys, carried from chunk to chunk and between decoding calls."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from llm.model.attention.short_convolution import Tail


class Documents(NamedTuple):
    """The documents of a row cut into chunks; a state carries only the document that ends its chunk."""

    ids: Int[Tensor, "batch chunks size"]
    before: Int[Tensor, "batch chunks"]
    """Document of the token before each chunk, which is the document of the state that the chunk receives."""

    @classmethod
    def cut(cls, ids: Int[Tensor, "batch time"], *, size: int, before: Int[Tensor, " batch"]) -> "Documents":
        """Cut ids into chunks of `size`; `before` is the document of the token before the first."""
        chunks = ids.unflatten(1, (-1, size))
        return cls(chunks, torch.cat((before[:, None], chunks[:, :-1, -1]), dim=1))

    @property
    def continues(self) -> Tensor:
        """Whether the received state belongs to the document that ends the chunk, [batch chunks]."""
        return self.ids[:, :, -1] == self.before

    @property
    def reads(self) -> Tensor:
        """Whether a token belongs to the document of the received state, [batch chunks size]."""
        return self.ids == self.before[..., None]

    @property
    def is_carried(self) -> Tensor:
        """Whether a token enters the state that the chunk passes on, [batch chunks size]."""
        return self.ids == self.ids[:, :, -1:]

    @property
    def visible(self) -> Tensor:
        """Which keys of its own chunk a token sees, [batch chunks size size]."""
        return (self.ids[..., :, None] == self.ids[..., None, :]).tril()


class _CarryStates(torch.autograd.Function):
    """The recurrence S_{n+1} = keep_n S_n + update_n over chunks; it saves only the states for the backward pass."""

    @staticmethod
    def forward(ctx: Any, keep: Tensor, updates: Tensor, initial: Tensor) -> Tensor:
        states = updates.new_empty(updates.shape[0] + 1, *updates.shape[1:])
        states[0] = initial
        for n in range(len(updates)):
            torch.addcmul(updates[n], keep[n], states[n], out=states[n + 1])
        ctx.save_for_backward(keep, states)
        return states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keep, states = ctx.saved_tensors
        (grad_states,) = grads
        grad_keep, grad_updates = torch.zeros_like(keep), torch.empty_like(states[1:])
        running = grad_states[-1].clone()
        for n in range(len(grad_updates) - 1, -1, -1):
            grad_updates[n] = running
            if ctx.needs_input_grad[0]:
                grad_keep[n] = (running * states[n]).sum_to_size(keep[n].shape)
            running = running * keep[n] + grad_states[n]
        return grad_keep, grad_updates, running


def carry_states(
    keep: Float[Tensor, " chunks *#shape"], updates: Float[Tensor, " chunks *shape"], initial: Float[Tensor, "*shape"]
) -> Float[Tensor, " chunks+1 *shape"]:
    """Return the state before each chunk and after the last: S_{n+1} = keep_n S_n + update_n.

    Args:
        keep: factor on the state; 0 where a chunk ends in another document.
        updates: tensor that each chunk adds to the state.
        initial: state before the first chunk.
    """
    return _CarryStates.apply(keep, updates, initial)


class StateCache:
    """A cache of running states, their document and the number of tokens seen; its size is the same at any length.

    Args:
        batch: number of rows.
        states: states of an empty text, first axis batch; they keep their own dtype.
        device: device of the states.
        tail: inputs of a short convolution before the first token, or None without one.
    """

    def __init__(
        self, *, batch: int, states: dict[str, Tensor], device: torch.device, tail: Tail | None = None
    ) -> None:
        self.states, self.tail = states, tail
        self.document = torch.zeros(batch, dtype=torch.long, device=device)
        self._length = 0

    @property
    def length(self) -> int:
        """Number of tokens seen so far."""
        return self._length

    def update(self, states: dict[str, Shaped[Tensor, "..."]], document_ids: Int[Tensor, "batch time"]) -> None:
        """Store the states after the tokens of these documents."""
        self.states, self.document = states, document_ids[:, -1]
        self._length += document_ids.shape[1]

    def reorder(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep the given rows, in this order."""
        self.states = {name: state[rows] for name, state in self.states.items()}
        self.document = self.document[rows]
        self.tail = None if self.tail is None else Tail(*(part[rows] for part in self.tail))

    def nbytes(self) -> int:
        """Return the bytes of all states."""
        tensors = [*self.states.values(), self.document, *(self.tail or ())]
        return sum(t.numel() * t.element_size() for t in tensors)
