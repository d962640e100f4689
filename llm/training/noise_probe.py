"""Measures the noise scale for `scaling.noise_scale=measured`: trains a copy of the model at the base batch."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from llm.callbacks.rng_state import get_rng_state, set_rng_state
from llm.contracts import IGNORED_LABEL, Batch, LossShare, Objective
from llm.errors import ConfigError
from llm.model.transformer import Transformer
from llm.ops.noise import KeyedNoise
from llm.scaling.noise_estimate import PROBE_REMEDY, SmoothedNoiseScale, two_batch_estimate

PROBE_UPDATES = 32
"""Updates of the probe. The noise scale is small at initialization and grows quickly at first."""
SKIPPED_UPDATES = 8
"""First updates of the probe, which are not measured."""
PROBE_PATIENCE = timedelta(hours=1)
"""Seconds that other ranks wait for the rank that measures."""
DECAY = 0.9
"""Decay of the averages. The end of the probe counts most, because the noise scale still grows."""


def measure_noise_scale(
    model: Transformer,
    *,
    objective: Objective,
    seed: int,
    windows: Iterable[int],
    read: Callable[[list[int]], Batch],
    windows_per_update: int,
    micro_batch_size: int,
    build_optimizer: Callable[[Transformer], torch.optim.Optimizer],
    lr_factor: Callable[[int], float],
    clip: float | None,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> float:
    """Return tr Σ / |g|² in windows, from the last of up to PROBE_UPDATES updates; the model itself stays as it is.

    Args:
        model: the decoder, which is copied.
        objective: what the decoder is trained to predict.
        seed: seed of the objective's noise.
        windows: numbers of training windows, in the order of the run.
        read: makes a batch of some of them.
        windows_per_update: windows of the base batch, at least 2.
        micro_batch_size: windows at a time, at most.
        build_optimizer: makes the run's optimizer for a model.
        lr_factor: `f(step) -> factor` on its rates.
        clip: largest norm of the gradient, or None.
        autocast: context of the forward pass.

    Raises:
        ConfigError: too few windows for the probe, or gradients without a measurable signal.
    """
    random_state = get_rng_state()
    size = _part_size(windows_per_update, micro_batch_size)
    probe, source = copy.deepcopy(model).train(), iter(windows)
    optimizer, smoothed = build_optimizer(probe), SmoothedNoiseScale(decay=DECAY)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    for step in range(PROBE_UPDATES):
        drawn = list(islice(source, windows_per_update))
        if len(drawn) < windows_per_update:
            break
        with torch.enable_grad():
            parts = [read(part) for part in _parts(drawn, size)]
            small, big = _gradients(probe, objective, parts, KeyedNoise(seed, step, torch.arange(size)), autocast)
        if step >= SKIPPED_UPDATES:
            signal, trace = two_batch_estimate(small, big, small=size, big=windows_per_update)
            smoothed.update("all", signal=signal, trace=trace)
        if clip:
            nn.utils.clip_grad_norm_(probe.parameters(), clip)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * lr_factor(step)
        optimizer.step()
        optimizer.zero_grad()
    set_rng_state(random_state)
    return _measured(smoothed, windows_per_update)


def _measured(smoothed: SmoothedNoiseScale, windows_per_update: int) -> float:
    found = smoothed.value("all")
    if found is None:
        raise ConfigError(
            f"scaling.noise_scale=measured: {PROBE_UPDATES} updates of {windows_per_update} windows show no "
            f"noise scale, because the run is too short or its gradients are too noisy; {PROBE_REMEDY}"
        )
    return found


def _part_size(windows: int, micro_batch_size: int) -> int:
    """Return the largest part that divides an update into at least two and fits a micro-batch."""
    return max(size for size in range(1, min(micro_batch_size, windows // 2) + 1) if windows % size == 0)


def _parts(windows: list[int], size: int) -> Iterator[list[int]]:
    return (windows[i : i + size] for i in range(0, len(windows), size))


def _gradients(
    model: Transformer,
    objective: Objective,
    parts: list[Batch],
    noise: KeyedNoise,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> tuple[float, float]:
    """Set the model's gradients to the mean over the parts; return the mean |G_part|² and |G|².

    `noise` is that of the first part.
    """
    total: list[Tensor | None] = [None for _ in model.parameters()]
    small, count = 0.0, len(parts)
    scored = [part["labels"][:, : None if objective.scores_last_label else -1] for part in parts]
    num_labels = sum(int((labels != IGNORED_LABEL).sum()) for labels in scored)
    is_counted = num_labels < sum(labels.numel() for labels in scored)
    share = LossShare(num_labels if is_counted else None, count)
    for index, part in enumerate(parts):
        rows = noise.rows.to(part["input_ids"].device) + index * len(noise.rows)
        with autocast():
            prepared = objective.prepare(model, part, noise._replace(rows=rows))
            out = model(**prepared.inputs)
            loss, _ = objective.loss(model, model, prepared, out, share)
        (loss + sum(out.losses.values())).backward()
        small += _square(model) / count
        for i, parameter in enumerate(model.parameters()):
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                held = total[i]
                total[i] = gradient.div_(count) if held is None else held.add_(gradient, alpha=1 / count)
    for parameter, gradient in zip(model.parameters(), total, strict=True):
        parameter.grad = gradient
    return small, _square(model)


def _square(model: nn.Module) -> float:
    return float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])) ** 2
