"""Defines the input and the result of every evaluation."""

from collections.abc import Callable, Iterator, Mapping
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

from llm.contracts import CAUSAL, Batch, Objective
from llm.errors import ConfigError
from llm.model.transformer import Transformer
from llm.ops.noise import KeyedNoise


@dataclass(frozen=True)
class Subject:
    """A trained model to evaluate, with the data of its run.

    Args:
        name: its name in tables.
        model: the decoder, on its device.
        objective: what the decoder was trained to predict.
        data: the run's data module after set-up, with `tokenizer`, `cache` and `validation_batches`.
        precision: precision of training; bf16-mixed multiplies in bf16.
        context_length: tokens per window in training, or the number that the user set instead.
        open_source: called as `(path or glob, share or None)`, gives a data module whose held-out part is that share of
            these files, or the run's own share.
        source_files: patterns of the run's own corpus, where it has several.
    """

    name: str
    model: Transformer
    objective: Objective
    data: Any
    precision: str
    context_length: int
    open_source: Callable[[str, float | None], Any]
    source_files: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.token_embedding.weight.device

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that multiplies in the precision of training."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16-mixed")


def require_causal(subject: Subject, what: str) -> None:
    """Raise ConfigError where an evaluation reads a text from left to right and the model was not trained to."""
    if subject.objective.sight != CAUSAL:
        raise ConfigError(
            f"{what}: scores each token from those before it, and objective={subject.objective.name} is not trained "
            "to; use eval=[loss,samples]"
        )


def window_noise(first: int, batch: Batch, *, sample: int = 0) -> KeyedNoise:
    """Return the noise of validation windows, which is the same for every run and validation.

    Args:
        first: number of the first of these windows.
        batch: the windows.
        sample: number of the sample.
    """
    ids = batch["input_ids"]
    return KeyedNoise(0, sample, first + torch.arange(len(ids), device=ids.device))


@dataclass(frozen=True)
class Result:
    """The result of an evaluation.

    Args:
        headline: the few numbers by which models are compared, by name.
        figures: all results, as plain data.
        header: column names of the table; empty for no table.
        rows: rows of the table, as text.
        text: text below the table.
        draw: a function that draws a plot into axes, or None.
    """

    headline: dict[str, float]
    figures: Any
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    text: str = ""
    draw: Callable[[Axes], None] | None = None


@runtime_checkable
class Evaluation(Protocol):
    """An evaluation, built from its own settings and called with a model."""

    def __call__(self, subject: Subject) -> Result:
        """Evaluate the model."""
        ...


def check_batches(name: str, batches: int | None) -> int | None:
    """Return the number of batches that an evaluation reads, or None for all; raise ConfigError if it is below 1."""
    if batches is not None and batches < 1:
        raise ConfigError(f"eval.{name}.batches={batches}: must be at least 1, or null for all; try 8")
    return batches


def save_plot(result: Result, path: Path) -> None:
    """Draw a result to a file, if it has a plot."""
    if result.draw is None:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    result.draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Return a batch on a device."""
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
    """Return the loss of every label in nats, computed as in training; 0 where there is no label."""
    with subject.autocast():
        hidden = subject.model(input_ids, positions=positions, document_ids=document_ids).hidden
        losses = subject.model.loss(hidden, labels, reduction="none")
    return losses.view(labels.shape)


def watch(subject: Subject, kind: type[nn.Module], see: Callable[[int, Any], None], *, batches: int | None) -> int:
    """Run validation batches and call `see(layer, output)` for modules of a class; return the number of modules.

    Args:
        subject: the model.
        kind: class of the modules.
        see: called once per module and batch.
        batches: largest number of batches, or None for all.
    """
    found = {
        (index, name): module
        for index, block in enumerate(subject.model.blocks())
        for name, module in block.named_modules()
        if isinstance(module, kind)
    }
    watch_modules(subject, found, lambda key, out: see(key[0], out), batches=batches)
    return len(found)


def watch_modules(
    subject: Subject, modules: Mapping[Any, nn.Module], see: Callable[[Any, Any], None], *, batches: int | None
) -> None:
    """Run validation batches and call `see(key, output)` for each of the given modules, once per batch."""
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, key=key: see(key, out)) for key, module in modules.items()
    ]
    try:
        if hooks:
            _run(subject, batches)
    finally:
        for hook in hooks:
            hook.remove()


def validation_batches(subject: Subject, limit: int | None) -> Iterator[Batch]:
    """Yield the first validation batches, on the model's device."""
    for index, batch in enumerate(subject.data.validation_batches()):
        if limit is not None and index >= limit:
            return
        yield on_device(batch, subject.device)


@torch.no_grad()
def _run(subject: Subject, limit: int | None) -> None:
    """Run the model on the inputs that its objective makes of validation windows."""
    seen = 0
    for batch in validation_batches(subject, limit):
        prepared = subject.objective.prepare(subject.model, batch, window_noise(seen, batch))
        seen += len(batch["input_ids"])
        with subject.autocast():
            subject.model(**prepared.inputs)
