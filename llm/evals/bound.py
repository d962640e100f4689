"""Evaluates all objectives on the same tokens, with the error of the estimate."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llm.errors import ConfigError
from llm.evals.evaluation import Result, Subject, on_device, window_noise

ESTIMATES = 4
"""Independent estimates of a bound; their spread is the error of sampling."""

HEADER = ["text", "tokens", "nats per token", "bits per byte", "perplexity", "standard error", "Monte Carlo error"]


class LikelihoodBound:
    """An evaluation of nats per token, bits per byte and perplexity on the tokens that every objective scores.

    Scored are the tokens 1 … T − 1 of each window without bos tokens, whatever the objective, and next-token prediction
    gives bos no probability. Figures of runs with different objectives therefore compare. Bounds are marked with `<=`.
    The standard error is that over windows, which all runs share. The Monte Carlo error is half the standard deviation
    of four independent estimates, and belongs to the sampling of corruptions alone.

    Args:
        samples: samples per window, a multiple of 4; None for the objective's own number.

    Raises:
        ConfigError: samples is no multiple of 4.
    """

    def __init__(self, *, samples: int | None) -> None:
        if samples is not None and (samples < 1 or samples % ESTIMATES):
            raise ConfigError(f"eval.bound.samples={samples}: must be a multiple of {ESTIMATES}, for as many estimates")
        self.samples = samples

    def __call__(self, subject: Subject) -> Result:
        """Measure the bound of the subject."""
        objective = subject.objective
        samples = (self.samples or objective.samples) if objective.is_bound else 1
        nats, tokens, num_bytes = window_sums(subject, strata=max(1, samples // ESTIMATES))
        found = bound_figures(nats, tokens, num_bytes)
        figures: dict[str, Any] = {**found, "is_bound": objective.is_bound, "samples": samples}
        headline = {name: found[name] for name in ("nats", "bits_per_byte", "monte_carlo_error") if name in found}
        sign = "<= " if objective.is_bound else ""
        bits = found.get("bits_per_byte")
        row = [
            *("validation", f"{float(tokens.sum()):.0f}", f"{sign}{found['nats']:.6f}"),
            "-" if bits is None else f"{sign}{bits:.6f}",
            *(
                f"{sign}{found['perplexity']:.4f}",
                f"{found['standard_error']:.4f}",
                f"{found['monte_carlo_error']:.4f}",
            ),
        ]
        return Result(headline=headline, figures=figures, header=HEADER, rows=[row])


@torch.no_grad()
def window_sums(
    subject: Subject, *, strata: int
) -> tuple[Float[Tensor, "windows estimates"], Float[Tensor, " windows"], float]:
    """Return nats of each validation window by estimate, its scored tokens, and the bytes of all scored tokens.

    Args:
        subject: the model.
        strata: samples of one estimate, whose levels lie in as many equal ranges.
    """
    objective, model = subject.objective, subject.model
    estimates = ESTIMATES if objective.is_bound else 1
    token_bytes = torch.as_tensor(subject.data.tokenizer.token_bytes, device=subject.device).double()
    nats, tokens, num_bytes, seen = [], [], 0.0, 0
    for batch in subject.data.validation_batches():
        batch = on_device(batch, subject.device)
        samples = []
        for number in range(estimates * strata):
            noise = window_noise(seen, batch, sample=number)
            with subject.autocast():
                samples.append(objective.token_nll(model, model, batch, noise, sample=number % strata, samples=strata))
        sums = torch.stack([sample.nats.double().sum(1) for sample in samples], 1)
        nats.append(sums.unflatten(1, (estimates, strata)).mean(2))
        labels, scored = samples[0].labels, samples[0].scored
        seen += len(labels)
        tokens.append(scored.sum(1).double())
        num_bytes += float((token_bytes[labels.clamp_min(0)] * scored).sum())
    return torch.cat(nats).cpu(), torch.cat(tokens).cpu(), num_bytes


def bound_figures(
    nats: Float[Tensor, "windows estimates"], tokens: Float[Tensor, " windows"], num_bytes: float
) -> dict[str, float]:
    """Return nats per token with both errors, perplexity, and bits per byte where the tokens stand for bytes."""
    total = float(tokens.sum())
    mean = float(nats.mean(1).sum() / total)
    deviations = nats.mean(1) - mean * tokens
    windows, estimates = nats.shape
    spread = float(deviations.square().sum() / max(1, windows - 1)) ** 0.5
    own = nats.sum(0) / total
    found = {
        "nats": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "standard_error": spread * math.sqrt(windows) / total,
        "monte_carlo_error": float(own.std() / math.sqrt(estimates)) if estimates > 1 else 0.0,
    }
    if num_bytes > 0:
        found["bits_per_byte"] = mean * total / (math.log(2) * num_bytes)
    return found
