"""Defines every type and Protocol that pieces exchange: read this file first.

Axis words in shapes: `batch time d_model heads kv_heads head_dim vocab experts codes`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypedDict, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

IGNORED_LABEL = -100
"""The label of a position that carries no loss."""

ParameterKind = Literal["matrix", "embedding", "head", "vector"]
UpdateFamily = Literal["gradient", "adaptive", "sign", "orthogonal"]
"""What the size of an optimizer's step depends on; batch rules and width rules are derived per family."""


# Values that pass between pieces.


class Batch(TypedDict):
    """One micro-batch of windows, as the data module yields it."""

    input_ids: Int[Tensor, "batch time"]
    labels: Int[Tensor, "batch time"]
    """`input_ids` shifted by one; `IGNORED_LABEL` carries no loss."""
    positions: Int[Tensor, "batch time"]
    """Position of each token within its document; restarts at 0 in each document."""
    document_ids: Int[Tensor, "batch time"]
    """Attention stays inside equal ids. Ids never decrease along a row."""


class SublayerOutput(NamedTuple):
    """The output of an attention or feed-forward layer.

    Losses and metrics are returned and never stored by forward: a recomputed forward must not count them twice.
    """

    hidden: Float[Tensor, "batch time d_model"]
    losses: dict[str, Tensor]
    """Weighted scalars that are added to the objective (VQ commitment, load balance)."""
    metrics: dict[str, Tensor]
    """Detached tensors that are only logged.

    Those named `stat/<name>` are summed over the micro-batches and ranks of an update instead, and handed back to the
    module that returned them: see `StatisticsReceiver`.
    """


class PositionView(NamedTuple):
    """One way to score pairs of tokens; RoPE and NTK give one view, ReRoPE gives two."""

    q: Float[Tensor, "batch time heads head_dim"]
    k: Float[Tensor, "batch time kv_heads head_dim"]
    min_distance: int
    """The view applies where `query_position - key_position >= min_distance`; the last view that applies wins."""


class ParamGroup(TypedDict):
    """Parameters that an optimizer treats alike; each trainable parameter is in exactly one group."""

    params: list[torch.nn.Parameter]
    names: list[str]
    kind: ParameterKind
    lr: float
    weight_decay: float


@dataclass(frozen=True, kw_only=True)
class AttentionGeometry:
    """The dimensions of an attention layer, which the model owns and hands down.

    Args:
        d_model: width of the residual stream.
        num_heads: number of query heads.
        num_kv_heads: number of key/value heads; divides num_heads (grouped queries, arXiv:2305.13245).
        head_dim: size of one head.
    """

    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class OptimizerTraits:
    """Facts about an update rule that batch rules, width rules and statistics need before any optimizer exists.

    Args:
        update_family: what the size of a step depends on.
        has_relative_rates: whether `lr` is relative to the size of each tensor.
        orthogonalizes: whether matrices move along orthogonalised directions.
        update_norm: `(settings of the factory, rows, columns) -> spectral norm of a matrix's step at lr = 1`; None
            where steps are elementwise.
    """

    update_family: UpdateFamily
    has_relative_rates: bool = False
    orthogonalizes: bool = False
    update_norm: Callable[[Mapping[str, Any], float, float], float] | None = None


# Optional capabilities of modules.


@runtime_checkable
class LayerCache(Protocol):
    """The state of one attention layer between decoding calls: keys and values, or a running state."""

    @property
    def length(self) -> int:
        """Number of tokens seen so far, the same for every row."""
        ...

    def reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Keep the given rows, in this order (beams, finished prompts)."""
        ...

    def nbytes(self) -> int:
        """Return the number of bytes held."""
        ...


@runtime_checkable
class KindedModule(Protocol):
    """A module that states the kind of each of its own parameters."""

    parameter_kinds: ClassVar[Mapping[str, ParameterKind]]


@runtime_checkable
class HeadStack(Protocol):
    """A module whose matrices stack attention heads."""

    @property
    def parameter_heads(self) -> Mapping[str, int]:
        """Number of heads by parameter name: positive along output rows, negative along input columns."""
        ...


@runtime_checkable
class ParameterBorrower(Protocol):
    """A module whose forward reads parameters of its submodules without calling them."""

    borrowed_parameters: ClassVar[Sequence[str]]
    """Dotted names of those parameters; ZeRO stage 3 gathers them for this module's forward."""


@runtime_checkable
class PartiallyActive(Protocol):
    """A module that uses only a share of its parameters for each token."""

    active_fraction: float


@runtime_checkable
class StatisticsReceiver(Protocol):
    """A module that learns from sums over a whole update (expert counts, codebook sums)."""

    def after_optimizer_step(self, statistics: dict[str, Tensor]) -> None:
        """Take the sums of the `stat/<name>` metrics that the layer returned during the update, by `<name>`."""
        ...


@runtime_checkable
class ExpertCounter(Protocol):
    """A feed-forward layer that counts how many tokens each expert received in the last update."""

    update_counts: Float[Tensor, " experts"]


@runtime_checkable
class InitializedModel(Protocol):
    """A model that knows its width and the standard deviation that each matrix started with."""

    d_model: int
    initial_stds: dict[str, float]


# Optional capabilities of optimizers.


@runtime_checkable
class HasTraits(Protocol):
    """An optimizer class that states its `OptimizerTraits`."""

    traits: ClassVar[OptimizerTraits]


@runtime_checkable
class DescribedOptimizer(Protocol):
    """An optimizer that can name its rule and size its state for the receipt."""

    def rule_of(self, group: dict[str, Any]) -> str:
        """Return the name of the rule that a group's parameters follow."""
        ...

    def state_bytes(self, group: dict[str, Any], parameter: Tensor) -> int:
        """Return the bytes of state that one parameter takes."""
        ...


@runtime_checkable
class GradientFolder(Protocol):
    """An optimizer that can fold gradients into its momentum during the backward pass."""

    @property
    def folds_gradients(self) -> bool:
        """Whether it does so, which leaves no gradient to clip or to inspect."""
        ...


@runtime_checkable
class NonFiniteShrinker(Protocol):
    """An optimizer that can shrink a tensor whose gradient is not finite."""

    shrink_ratio: float | None
    """Factor towards the resting value; None where it does not shrink."""


@runtime_checkable
class ShardedOptimizer(Protocol):
    """An optimizer that can update flat shards of parameters and owns state that no shard holds."""

    owned_state: dict[str, dict[str, Tensor]]
    """State of the matrices that this rank owns, by parameter name."""

    def attach_layouts(self, layouts: Sequence[Any]) -> None:
        """Take the shards' layouts; every later step updates shards."""
        ...

    def load_owned_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restore `owned_state` from a checkpoint."""
        ...


# Optional capabilities of callbacks, loggers, strategies and data modules.


@runtime_checkable
class StepReporter(Protocol):
    """A callback that adds metrics to each logged update."""

    def step_metrics(self, trainer: Any, pl_module: Any) -> Mapping[str, Tensor | float]:
        """Return metrics of the last update by full name."""
        ...


@runtime_checkable
class ValidationReporter(Protocol):
    """A callback that adds metrics to each validation."""

    def validation_metrics(self, trainer: Any) -> Mapping[str, float]:
        """Return metrics of the last validation by full name."""
        ...


@runtime_checkable
class FinalReporter(Protocol):
    """A callback that adds figures to summary.json at the end of a run."""

    def final_figures(self, trainer: Any, pl_module: Any) -> Mapping[str, Any]:
        """Return the figures by name."""
        ...


@runtime_checkable
class SpeedReporter(Protocol):
    """A callback that measures training speed."""

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second over the last updates; None until it is known."""
        ...


@runtime_checkable
class StopRequest(Protocol):
    """A callback that ends the run when a signal arrives."""

    signal: Any
    """The `signal.Signals` member that stops the run; None while there is none."""


@runtime_checkable
class WeightAverager(Protocol):
    """A callback that averages weights from some update on."""

    first_average: int
    """The update after which the average first exists."""


@runtime_checkable
class MicroBatchComparer(Protocol):
    """A callback that compares micro-batches and needs several of them per update."""

    least_micro_batches: ClassVar[int]


@runtime_checkable
class UpdateRefuser(Protocol):
    """A LightningModule that may refuse an update and can say what was in it."""

    def take_refused(self) -> dict[str, Any] | None:
        """Return the last refused update (step, why, loss, grad_norm, losses), once; None where there is none."""
        ...


@runtime_checkable
class RowLogger(Protocol):
    """A logger that can show a table."""

    def log_rows(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, tokens_seen: int) -> None:
        """Log a table under `name`."""
        ...


@runtime_checkable
class ShardingStrategy(Protocol):
    """A Lightning strategy that may hold parameters, gradients and optimizer state in shards."""

    layouts: list[Any]
    """Layout of each flat shard; empty where nothing is sharded."""

    @property
    def forwards_together(self) -> bool:
        """Whether a forward pass needs all ranks, because each holds a part of every weight."""
        ...

    def gradients(self) -> Any:
        """Return the gradients between the backward pass and the update."""
        ...

    def squared_gradients(self, parameters: list[Any]) -> Tensor:
        """Return the squared norm of the gradients of some parameters over the whole update, before clipping."""
        ...


@runtime_checkable
class TrainerChecker(Protocol):
    """A Trainer factory with rules of its own that a configuration must satisfy."""

    def check_settings(self, trainer: Mapping[str, Any], *, precision: str, compiled: bool) -> None:
        """Raise ConfigError for a trainer node that the factory cannot honour."""
        ...


@runtime_checkable
class WorkerWatcher(Protocol):
    """A data module that reads in worker processes and knows how they ended."""

    def killed_workers(self) -> list[str]:
        """Return the names of the signals that ended workers."""
        ...


@runtime_checkable
class LabelCounter(Protocol):
    """A data module that knows how many labels of an update carry a loss before any of its micro-batches is read."""

    def labels_of_step(self, step: int) -> int | None:
        """Return their number over all micro-batches and ranks of an update; None where every label carries a loss."""
        ...


@runtime_checkable
class WindowIndexer(Protocol):
    """A data module that can name the windows of any update."""

    def windows_of_step(self, step: int) -> list[int]:
        """Return the indices of the windows of an update."""
        ...

    def documents_in(self, windows: list[int]) -> list[tuple[int, int]]:
        """Return the first and last document of the corpus in each window."""
        ...
