"""Defines every type and Protocol that pieces exchange: read this file first.

Axis words in shapes: `batch time d_model heads kv_heads head_dim vocab experts codes`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypedDict, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
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


SightKind = Literal["causal", "bidirectional", "block", "block_pair"]


class Sight(NamedTuple):
    """The keys of its own document that a query sees.

    causal: those up to itself. bidirectional: all. block: those of its own block and of earlier ones.
    block_pair: the input is a noisy copy followed by a clean copy of the same tokens. A noisy token sees its own noisy
    block and earlier clean blocks; a clean token sees its own clean block and earlier ones, and never a noisy token.
    """

    kind: SightKind
    block_length: int = 0
    """Tokens per block of `block` and `block_pair`: the block of a token is `position // block_length`."""


CAUSAL = Sight("causal")
"""The sight of a decoder that predicts the next token."""
BIDIRECTIONAL = Sight("bidirectional")
"""The sight of a decoder that predicts tokens from both sides."""


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


class MomentumWeights(NamedTuple):
    """Weights of the newest gradient, of the one before, and the ratio of each later one: w₀, w₁, w₁r, w₁r², …"""

    newest: float
    previous: float
    ratio: float

    @classmethod
    def of_average(cls, decay: float) -> "MomentumWeights":
        """Return the weights of an exponential average."""
        return cls(1 - decay, (1 - decay) * decay, decay)


@dataclass(frozen=True, kw_only=True)
class OptimizerTraits:
    """Facts about an update rule that batch rules, width rules and statistics need before any optimizer exists.

    Args:
        update_family: what the size of a step depends on.
        has_relative_rates: whether `lr` is relative to the size of each tensor.
        orthogonalizes: whether matrices move along orthogonalised directions.
        momentum_weights: settings of the factory -> the weights of past gradients in a step; None where unknown.
        update_norm: `(settings of the factory, rows, columns) -> spectral norm of a matrix's step at lr = 1`; None
            where steps are elementwise.
    """

    update_family: UpdateFamily
    has_relative_rates: bool = False
    orthogonalizes: bool = False
    momentum_weights: Callable[[Mapping[str, Any]], MomentumWeights] | None = None
    update_norm: Callable[[Mapping[str, Any], float, float], float] | None = None


# What is predicted.


@runtime_checkable
class Noise(Protocol):
    """The noise of a micro-batch: every draw is a function of seed, step and row, and of nothing else."""

    @property
    def rows(self) -> Int[Tensor, " batch"]:
        """Place of each row within its update, or number of each validation window."""
        ...

    def uniform(self, columns: int, *, stream: int) -> Float[Tensor, "batch {columns}"]:
        """Return numbers in [0, 1) in fp64; each stream has its own."""
        ...

    def levels(self, per_row: int = 1) -> Float[Tensor, "batch {per_row}"]:
        """Return levels in [0, 1), evenly spread over consecutive ones and over rows, in fp64."""
        ...

    def normal(self, *shape: int) -> Float[Tensor, "batch ..."]:
        """Return standard normal numbers in fp32."""
        ...


class LossShare(NamedTuple):
    """The share of a micro-batch in the loss of its update."""

    num_labels: int | None
    """Labels with a loss in the whole update; None where every label of the update has one."""
    num_parts: int
    """Micro-batches of the update over all ranks."""


WHOLE_UPDATE = LossShare(num_labels=None, num_parts=1)
"""The share of a micro-batch that is an update of its own."""


class Prepared(NamedTuple):
    """The input of one forward pass, and what the loss of that pass needs."""

    inputs: dict[str, Any]
    """Keyword arguments of `Transformer.forward`."""
    targets: dict[str, Tensor]


class TokenNLL(NamedTuple):
    """Negative log-likelihoods of tokens in nats, or one unbiased sample of an upper bound of each."""

    nats: Float[Tensor, "batch time"]
    """0 where a token is not scored."""
    labels: Int[Tensor, "batch time"]
    """Ids of the scored tokens, `IGNORED_LABEL` elsewhere."""

    @property
    def scored(self) -> Bool[Tensor, "batch time"]:
        """Whether each token is scored."""
        return self.labels != IGNORED_LABEL


@runtime_checkable
class DrawnTokens(Protocol):
    """New tokens of several prompts, drawn while they are read."""

    def __iter__(self) -> Iterator[Int[Tensor, "batch ..."]]:
        """Yield the next token of each row [batch], or its next tokens [batch new]."""
        ...

    def cache_bytes(self) -> int:
        """Return the bytes of the caches; 0 without a cache."""
        ...


@runtime_checkable
class Objective(Protocol):
    """What a decoder is trained to predict.

    `model` is the decoder, and `run` its forward, which may be compiled.
    """

    name: ClassVar[str]
    """Its option in conf/objective."""
    sight: Sight
    """The sight of training; each attention and position of the model must serve it."""
    extra_tokens: ClassVar[int]
    """Input ids above the vocabulary, such as a mask."""
    num_times: ClassVar[int]
    """Times that the model reads per token."""
    is_bound: ClassVar[bool]
    """Whether `token_nll` is an upper bound of the negative log-likelihood instead of its value."""
    scores_last_label: ClassVar[bool]
    """Whether training scores the last label of a window, which is not among its input ids."""
    samples: int
    """Samples of the bound per window in an evaluation; 1 where there is nothing to sample."""

    def check(self, *, context_length: int) -> None:
        """Raise ConfigError where the settings do not fit windows of context_length tokens."""
        ...

    def prepare(self, model: Any, batch: Batch, noise: Noise) -> Prepared:
        """Return the corrupted input of a micro-batch and its targets; a function of batch and noise."""
        ...

    def loss(
        self, model: Any, run: Callable[..., Any], prepared: Prepared, out: Any, share: LossShare
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Return the loss in nats per label, whose mean over the parts is that of the update, and metrics to log."""
        ...

    def validation_nll(self, model: Any, run: Callable[..., Any], batch: Batch, noise: Noise) -> TokenNLL:
        """Return what val/loss averages: one sample, on the labels that training scores."""
        ...

    def token_nll(
        self, model: Any, run: Callable[..., Any], batch: Batch, noise: Noise, *, sample: int, samples: int
    ) -> TokenNLL:
        """Return sample number `sample` of `samples` stratified ones, on the tokens that every objective scores."""
        ...

    def decode(
        self, model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, steps: int | None, **sampling: Any
    ) -> DrawnTokens:
        """Return the new tokens of each prompt, which are drawn while they are read.

        `steps` is the number of forward passes, or None for one per token. `sampling` are the other settings of
        `llm.generate.decode.Decoding`.
        """
        ...

    def flops_per_token(self, model: Any, context_length: int) -> float:
        """Return the FLOPs of the forward passes of training per clean token of a window."""
        ...


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
class RewindableCache(LayerCache, Protocol):
    """A cache that can forget its last tokens, so that they can be read again with other ids."""

    def rewind(self, length: int) -> None:
        """Keep the first `length` tokens."""
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
class LogitMeter(Protocol):
    """An attention that can measure the largest logit of each head, and shrink the weights that make it."""

    measures_logits: bool
    """Whether training returns the metric `peak/logit`, an upper bound of each head's largest logit, [heads]."""

    def logit_factors(self, factors: Float[Tensor, " heads"]) -> dict[str, Tensor]:
        """Return factors for blocks of rows of its parameters, by name, that multiply each head's logits by `factors`.

        A parameter with n factors consists of n equal blocks of consecutive elements.
        """
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


@runtime_checkable
class WorkSharer(Protocol):
    """An optimizer that divides its work over ranks that hold equal weights and gradients."""

    def share_work(self, shares: Any) -> None:
        """Divide the work of later steps over the ranks of a `RankShares`."""
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

    def labels_of_step(self, step: int, *, with_last: bool = True) -> int | None:
        """Return their number over all micro-batches and ranks of an update; None where every label carries a loss.

        Without `with_last` the last label of each window is not counted.
        """
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
