"""Evaluates how well a model predicts held-out text."""

from typing import Any

import torch

from llm.errors import ConfigError, DataError
from llm.evals.evaluation import Result, Subject, on_device, require_causal, window_noise
from llm.evals.loss_metrics import validation_metrics
from llm.evals.strided import strided_sums
from llm.ops.loss import loss_and_byte_sums

HEADER = ["text", "tokens", "bytes", "nats per token", "bits per byte", "perplexity"]


class HeldOutLoss:
    """An evaluation of loss, bits per byte and perplexity, on the validation split and on each source of text.

    An objective with a bound takes one sample of it per window, as val/loss does, and its figures are marked with `<=`.

        bits per byte = Σ loss / (ln 2 · bytes that the tokens represent)

    Bits per byte do not depend on the tokenizer, so that models with different tokenizers can be compared.

    Args:
        sources: other texts by name, each a path or glob. None measures each pattern of data.val_files, or else of
            data.files, where there are several. An empty mapping measures none.
        share: share of the documents of each source to read, in (0, 1]. None reads a text whole, but a pattern of the
            run's own data.files only as far as the run held it out.
        stride: tokens between the beginnings of overlapping windows, in [1, context_length − 1], or None for windows
            that follow each other as in training; see `llm.evals.strided.strided_sums`.

    Raises:
        ConfigError: share or stride lies outside its range.
    """

    def __init__(
        self, *, sources: dict[str, str] | None, share: float | None = None, stride: int | None = None
    ) -> None:
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"eval.loss.share={share}: must lie in (0, 1]; 1 reads the whole text")
        self.sources, self.share, self.stride = sources, share, stride

    def __call__(self, subject: Subject) -> Result:
        """Measure the losses of the subject."""
        if self.stride is not None:
            require_causal(subject, f"eval.loss.stride={self.stride}")
        if self.stride is not None and not 1 <= self.stride < subject.context_length:
            raise ConfigError(
                f"eval.loss.stride={self.stride}: must lie in [1, context_length - 1 = {subject.context_length - 1}]; "
                f"try {max(1, subject.context_length // 2)}"
            )
        sums = {"validation": self._sums(subject, subject.data)}
        sources = {name: name for name in subject.source_files} if self.sources is None else self.sources
        for name, files in sources.items():
            sums[name] = self._sums(subject, self._open(subject, name, files))
        metrics = {name: validation_metrics(*values) for name, values in sums.items()}
        figures: dict[str, Any] = dict(metrics["validation"])
        if sources:
            figures["by_source"] = {name: metrics[name] for name in sources}
        sign = "<= " if subject.objective.is_bound else ""
        rows = [_row(name, sums[name], metrics[name], sign) for name in sums]
        headline = {name.removeprefix("val/"): value for name, value in metrics["validation"].items()}
        headline |= {f"loss of {name}": metrics[name]["val/loss"] for name in sources}
        return Result(headline=headline, figures=figures, header=HEADER, rows=rows)

    def _sums(self, subject: Subject, data: Any) -> tuple[float, float, float]:
        if self.stride is None:
            return loss_sums(subject, data)
        return strided_sums(subject, data, stride=self.stride)

    def _open(self, subject: Subject, name: str, files: str) -> Any:
        try:
            return subject.open_source(files, self.share)
        except DataError as error:
            raise DataError(f"eval.loss.sources.{name}={files}: cannot be read: {error}") from error


def loss_sums(subject: Subject, data: Any) -> tuple[float, float, float]:
    """Return the summed loss in nats, the number of labels and the bytes they represent, over the validation split."""
    token_bytes = torch.as_tensor(data.tokenizer.token_bytes, device=subject.device).float()
    total = torch.zeros(3, dtype=torch.float64, device=subject.device)
    seen = 0
    for batch in data.validation_batches():
        batch = on_device(batch, subject.device)
        with subject.autocast():
            found = subject.objective.validation_nll(subject.model, subject.model, batch, window_noise(seen, batch))
        seen += len(batch["input_ids"])
        total += loss_and_byte_sums(found.nats, found.labels, token_bytes)
    loss, tokens, num_bytes = total.tolist()
    return loss, tokens, num_bytes


def _row(name: str, sums: tuple[float, float, float], metrics: dict[str, float], sign: str) -> list[str]:
    bits = metrics.get("val/bits_per_byte")
    return [
        name,
        f"{sums[1]:.0f}",
        f"{sums[2]:.0f}",
        f"{sign}{metrics['val/loss']:.6f}",
        "-" if bits is None else f"{sign}{bits:.6f}",
        f"{sign}{metrics['val/perplexity']:.4f}",
    ]
