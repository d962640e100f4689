"""Evaluates a model on contexts longer than its training windows."""

import logging
import math

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from torch import Tensor

from llm.errors import ConfigError, DataError
from llm.evals.evaluation import Result, Subject, require_causal, token_losses

TOKENS_AT_ONCE = 4096
"""Tokens per forward pass, where a window is shorter."""

log = logging.getLogger(__name__)


class Extrapolation:
    """An evaluation of the loss by length of the context, and by position within one long text.

    The loss by context is that of the same last tokens of long held-out documents, after 1x, 2x, … the training length
    of the text before them. Positions start at the first token that is read. The position encoding is the run's own, or
    the one that model/position= sets.

    Args:
        factors: lengths of context, as multiples of the training length, ascending. Those that no held-out document
            reaches are skipped with a warning.
        last: number of last tokens whose loss is compared, at most the training length.
        windows: largest number of text windows, spread over all documents that are long enough.

    Raises:
        ConfigError: a setting is out of its range.
        DataError: no held-out document is longer than the training length.
    """

    def __init__(self, *, factors: list[int], last: int, windows: int) -> None:
        if not factors or min(factors) < 1 or sorted(set(factors)) != list(factors):
            raise ConfigError(f"eval.extrapolation.factors={factors}: must ascend from 1 or more; try [1,2,4,8]")
        for key, value in (("last", last), ("windows", windows)):
            if value < 1:
                raise ConfigError(f"eval.extrapolation.{key}={value}: must be at least 1; try 32")
        self.factors, self.last, self.windows = factors, last, windows

    def __call__(self, subject: Subject) -> Result:
        """Measure the losses of the subject."""
        require_causal(subject, "eval=extrapolation")
        length = subject.context_length
        if self.last > length:
            raise ConfigError(f"eval.extrapolation.last={self.last}: above context_length={length}; lower it")
        factors, windows = self._reachable(subject)
        by_context = {f * length: self.loss_by_context(subject, windows, f * length) for f in factors}
        by_position = loss_by_position(subject, windows, stretch=max(1, length // 2))
        rows = [[str(n), f"{loss:.4f}", f"{error:.4f}"] for n, (loss, error) in by_context.items()]
        return Result(
            headline={f"loss at {n}": loss for n, (loss, _) in by_context.items()},
            figures={
                "windows": len(windows),
                "last": self.last,
                "by_context": {str(n): {"loss": a, "standard_error": b} for n, (a, b) in by_context.items()},
                "by_position": {"stretch": max(1, length // 2), "loss": by_position},
            },
            header=["tokens of context", "nats per token", "standard error"],
            rows=rows,
            draw=lambda axes: _draw(axes, by_context, by_position, max(1, length // 2)),
        )

    def _reachable(self, subject: Subject) -> tuple[list[int], Tensor]:
        """Return the factors for which there is text, and windows of the largest one."""
        for count in range(len(self.factors), 0, -1):
            windows = long_windows(subject, self.factors[count - 1] * subject.context_length, self.windows)
            if len(windows):
                for factor in self.factors[count:]:
                    log.warning("extrapolation: no held-out document has %dx the training length", factor)
                return self.factors[:count], windows
        raise DataError(
            f"eval=extrapolation: no held-out document is longer than context_length={subject.context_length}; "
            "raise loader.val_fraction in training, or evaluate with a smaller context_length"
        )

    def loss_by_context(self, subject: Subject, windows: Tensor, length: int) -> tuple[float, float]:
        """Return the mean loss of the last tokens and its standard error over windows."""
        loss = window_losses(subject, windows[:, -length - 1 :])[:, -self.last :].double().mean(1)
        error = float(loss.std() / math.sqrt(len(loss))) if len(loss) > 1 else math.nan
        return float(loss.mean()), error


def long_windows(subject: Subject, length: int, count: int) -> Int[Tensor, "windows ids"]:
    """Return windows of held-out documents, [at most count, length + 1] ids, spread over all that are long enough."""
    stream, bos = subject.data.cache.val, subject.data.tokenizer.bos_id
    ids = np.asarray(stream.read(0, len(stream))).astype(np.int64)
    starts = np.flatnonzero(ids == bos)
    ends = np.append(starts[1:], len(ids))
    rows = [
        ids[stop - length - 1 : stop]
        for start, end in zip(starts, ends, strict=True)
        for stop in range(int(end), int(start) + length, -length)
    ]
    if not rows:
        return torch.empty(0, length + 1, dtype=torch.long)
    chosen = np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)
    return torch.from_numpy(np.stack([rows[i] for i in chosen]))


def window_losses(subject: Subject, windows: Int[Tensor, "windows ids"]) -> Float[Tensor, "windows time"]:
    """Return the loss of every token of every window; positions start at 0 in each window."""
    answer = []
    for part in windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1])):
        part = part.to(subject.device)
        places = torch.arange(part.shape[1] - 1, device=part.device).expand(len(part), -1)
        answer.append(token_losses(subject, part[:, :-1], part[:, 1:], positions=places, document_ids=None).cpu())
    return torch.cat(answer)


def loss_by_position(subject: Subject, windows: Int[Tensor, "windows ids"], *, stretch: int) -> list[float]:
    """Return the mean loss in consecutive ranges of positions, over the whole windows."""
    loss = window_losses(subject, windows).double().mean(0)
    return [float(part.mean()) for part in loss.split(stretch)]


def _draw(axes: Axes, by_context: dict[int, tuple[float, float]], by_position: list[float], stretch: int) -> None:
    lengths = list(by_context)
    means = [loss for loss, _ in by_context.values()]
    errors = [0.0 if math.isnan(error) else error for _, error in by_context.values()]
    axes.errorbar(lengths, means, yerr=errors, marker="o", capsize=3, label="last tokens, by length of context")
    places = [(i + 0.5) * stretch for i in range(len(by_position))]
    axes.plot(places, by_position, alpha=0.7, label="by position in the longest read")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss, nats")
    axes.legend(frameon=False, fontsize=9)
