"""How well a model predicts held-out text."""

from typing import Any

import torch

from llm.errors import ConfigError, DataError
from llm.evals.base import Result, Subject, on_device, token_losses
from llm.evals.loss_metrics import validation_metrics
from llm.ops.loss import loss_and_byte_sums

HEADER = ["text", "tokens", "bytes", "nats a token", "bits per byte", "perplexity"]


class Loss:
    """Measures nats a token, bits per byte and perplexity on the validation split, and on each source of text apart.

        bits per byte = Σ loss / (ln 2 · bytes that the tokens stand for)

    Bits per byte do not depend on the tokenizer, so models with different ones compare by them.

    Args:
        sources: other texts by name, each a path or glob; of each the share that a run would hold out is read, so that
            text of the run's own corpus was not trained on. None for the patterns of data.files, where there are
            several, and an empty mapping for none.
        share: of each such source to read, in (0, 1), or None for the share that the run held out.

    Raises:
        ConfigError: a share outside (0, 1).
    """

    def __init__(self, *, sources: dict[str, str] | None, share: float | None) -> None:
        if share is not None and not 0 < share < 1:
            raise ConfigError(f"eval.loss.share={share}: must lie in (0, 1); 0.99 for text that no run was trained on")
        self.sources, self.share = sources, share

    def __call__(self, subject: Subject) -> Result:
        """Measure."""
        sums = {"validation": loss_sums(subject, subject.data)}
        sources = {name: name for name in subject.source_files} if self.sources is None else self.sources
        for name, files in sources.items():
            sums[name] = loss_sums(subject, self._open(subject, name, files))
        metrics = {name: validation_metrics(*values) for name, values in sums.items()}
        figures: dict[str, Any] = dict(metrics["validation"])
        if sources:
            figures["by_source"] = {name: metrics[name] for name in sources}
        rows = [_row(name, sums[name], metrics[name]) for name in sums]
        headline = {name.removeprefix("val/"): value for name, value in metrics["validation"].items()}
        headline |= {f"loss of {name}": metrics[name]["val/loss"] for name in sources}
        return Result(headline=headline, figures=figures, header=HEADER, rows=rows)

    def _open(self, subject: Subject, name: str, files: str) -> Any:
        try:
            return subject.open_source(files, self.share)
        except DataError as error:
            raise DataError(f"eval.loss.sources.{name}={files}: cannot be read: {error}") from error


def loss_sums(subject: Subject, data: Any) -> tuple[float, float, float]:
    """Return the summed loss in nats, the number of labels, and the bytes they stand for, over the validation split."""
    token_bytes = torch.as_tensor(data.tokenizer.token_bytes, device=subject.device).float()
    total = torch.zeros(3, dtype=torch.float64, device=subject.device)
    for batch in data.validation_batches():
        batch = on_device(batch, subject.device)
        labels = batch["labels"]
        losses = token_losses(
            subject,
            batch["input_ids"],
            labels,
            positions=batch["positions"],
            document_ids=batch["document_ids"],
        )
        total += loss_and_byte_sums(losses, labels, token_bytes)
    loss, tokens, num_bytes = total.tolist()
    return loss, tokens, num_bytes


def _row(name: str, sums: tuple[float, float, float], metrics: dict[str, float]) -> list[str]:
    bits = metrics.get("val/bits_per_byte")
    return [
        name,
        f"{sums[1]:.0f}",
        f"{sums[2]:.0f}",
        f"{metrics['val/loss']:.6f}",
        "-" if bits is None else f"{bits:.6f}",
        f"{metrics['val/perplexity']:.4f}",
    ]
