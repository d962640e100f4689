"""The types that pieces exchange: read this file first.

Axis words in shapes: `batch time d_model heads kv_heads head_dim vocab experts codes`.
"""

from typing import Literal, NamedTuple, Protocol, TypedDict, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

IGNORED_LABEL = -100
"""The label of a position that carries no loss."""

ParameterKind = Literal["matrix", "embedding", "head", "vector"]


class Batch(TypedDict):
    """One micro-batch of windows, as the data module yields it."""

    input_ids: Int[Tensor, "batch time"]
    labels: Int[Tensor, "batch time"]
    """`input_ids` shifted by one; `IGNORED_LABEL` carries no loss."""
    positions: Int[Tensor, "batch time"]
    """Restarts at 0 in each document."""
    document_ids: Int[Tensor, "batch time"]
    """Attention stays inside equal ids. Ids never decrease along a row."""


class SublayerOutput(NamedTuple):
    """What an attention or a feed-forward returns."""

    hidden: Float[Tensor, "batch time d_model"]
    losses: dict[str, Tensor]
    """Weighted scalars added to the objective (VQ commitment, MoE balance)."""
    metrics: dict[str, Tensor]
    """Detached tensors, only logged; those named `stat/…` are summed over the update and handed back to the module
    that returned them, as `after_optimizer_step({"…": sum})`."""


class PositionView(NamedTuple):
    """One way to score pairs; RoPE and NTK give one view, ReRoPE two."""

    q: Float[Tensor, "batch time heads head_dim"]
    k: Float[Tensor, "batch time kv_heads head_dim"]
    min_distance: int
    """The view serves `query_position - key_position >= min_distance`; the last view that serves wins."""


class ParamGroup(TypedDict):
    """Parameters that an optimizer treats alike; each trainable parameter is in exactly one group."""

    params: list[torch.nn.Parameter]
    names: list[str]
    kind: ParameterKind
    lr: float
    weight_decay: float


@runtime_checkable
class LayerCache(Protocol):
    """What one attention layer remembers between decoding calls: keys and values, or a running state."""

    @property
    def length(self) -> int:
        """Tokens seen so far, the same for every row."""
        ...

    def reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Keep the given rows, in this order (beams, finished prompts)."""
        ...

    def nbytes(self) -> int:
        """Bytes held."""
        ...
