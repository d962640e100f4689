"""Defines the input and the result of every evaluation."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from llm.contracts import Batch
from llm.errors import ConfigError
from llm.model.transformer import Transformer


@dataclass(frozen=True)
class Subject:
    """The model to judge, as its run left it.

    Args:
        name: how tables call it.
        model: the decoder, on its device.
        data: the run's data module, set up, with `tokenizer`, `cache` and `validation_batches`.
        precision: in which it was trained: bf16-mixed multiplies in bf16.
        context_length: tokens a window in training, or those that were asked for instead.
        open_source: called as `(path or glob, share or None)`, gives a data module whose held-out part is that share of
            these files, or the run's own share.
        source_files: patterns of the run's own corpus, where it has several.
    """

    name: str
    model: Transformer
    data: Any
    precision: str
    context_length: int
    open_source: Callable[[str, float | None], Any]
    source_files: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.model.token_embedding.weight.device

    def autocast(self) -> AbstractContextManager[Any]:
        """Multiply as training does."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16-mixed")


@dataclass(frozen=True)
class Result:
    """What an evaluation found.

    Args:
        headline: the few numbers by which models are compared, by name.
        figures: all of it, as plain data.
        header: of the table, none for no table.
        rows: of the table, as text.
        text: to be shown under the table.
        draw: draws it into axes, or None.
    """

    headline: dict[str, float]
    figures: Any
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    text: str = ""
    draw: Callable[[Axes], None] | None = None


@runtime_checkable
class Evaluation(Protocol):
    """One way to judge a model; made with its own settings, called with the model."""

    def __call__(self, subject: Subject) -> Result:
        """Judge."""
        ...


def check_batches(name: str, batches: int | None) -> int | None:
    """Return how many batches the evaluation of that name reads, None for all; raise ConfigError for less than one."""
    if batches is not None and batches < 1:
        raise ConfigError(f"eval.{name}.batches={batches}: must be at least 1, or null for all; try 8")
    return batches


def save_plot(result: Result, path: Path) -> None:
    """Draw a result to a file; nothing where it has no picture."""
    if result.draw is None:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    result.draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch."""
    return Batch(**{key: value.to(device, non_blocking=True) for key, value in batch.items()})  # type: ignore[typeddict-item]


@torch.no_grad()
def token_losses(
    subject: Subject,
    input_ids: Int[Tensor, "batch time"],
    labels: Int[Tensor, "batch time"],
    *,
    positions: Int[Tensor, "batch time"],
    document_ids: Int[Tensor, "batch time"] | None,
) -> Float[Tensor, "batch time"]:
    """Return the loss of every label in nats, by the code and in the precision of training; 0 where there is none."""
    with subject.autocast():
        hidden = subject.model(input_ids, positions=positions, document_ids=document_ids).hidden
        losses = subject.model.loss(hidden, labels, reduction="none")
    return losses.view(labels.shape)


def watch(subject: Subject, kind: type[nn.Module], see: Callable[[int, Any], None], *, batches: int | None) -> int:
    """Run validation batches and hand what modules of a kind return to `see(layer, output)`; return how many there are.

    Args:
        subject: the model.
        kind: class of the modules to watch.
        see: called once a module and batch.
        batches: at most so many, or None for all.
    """
    hooks = []
    for index, block in enumerate(subject.model.blocks()):
        for module in block.modules():
            if isinstance(module, kind):
                hooks.append(module.register_forward_hook(lambda _m, _i, out, layer=index: see(layer, out)))
    try:
        if hooks:
            _run(subject, batches)
    finally:
        for hook in hooks:
            hook.remove()
    return len(hooks)


def validation_batches(subject: Subject, limit: int | None) -> Iterator[Batch]:
    """Yield the first validation batches, on the model's device."""
    for index, batch in enumerate(subject.data.validation_batches()):
        if limit is not None and index >= limit:
            return
        yield on_device(batch, subject.device)


@torch.no_grad()
def _run(subject: Subject, limit: int | None) -> None:
    for batch in validation_batches(subject, limit):
        with subject.autocast():
            subject.model(batch["input_ids"], positions=batch["positions"], document_ids=batch["document_ids"])
