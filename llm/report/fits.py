"""Fits power laws: best learning rate against batch, loss against parameters and FLOPs."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llm.errors import ConfigError
from llm.report.groups import Group
from llm.report.runs import RunRecord
from llm.report.significance import PowerLaw, power_law
from llm.scaling import rules

BATCH, SCALING = "batch_tokens", "scaling."
SIZE_KEYS = (
    "model.d_model",
    "model.num_layers",
    "model.num_heads",
    "model.num_kv_heads",
    "model/size",
    "context_length",
)


@dataclass(frozen=True)
class Fit:
    """A power law through some groups.

    Args:
        name: the two quantities, such as `best lr against batch_tokens`.
        subject: the settings that all points share.
        x_name: name of the horizontal axis.
        y_name: name of the vertical axis.
        points: (x, y) of each group.
        law: the fitted law.
        overrides: suggested runs, each as overrides for `python train.py`.
        caution: a limitation of the fit, or "".
    """

    name: str
    subject: str
    x_name: str
    y_name: str
    points: list[tuple[float, float]]
    law: PowerLaw
    overrides: list[str]
    caution: str


def best_rate(group: Group) -> tuple[float, bool] | None:
    """Return a group's best learning rate, and whether it lies between the lowest and the highest rate tried.

    There it is the minimum of the parabola through the best rate and its neighbours, over the logarithm of the rate.
    """
    scored = [(math.log(c.lr), c.mean) for c in group.cells if c.lr and math.isfinite(c.mean)]
    at = next((i for i, (x, _) in enumerate(scored) if group.best.lr and x == math.log(group.best.lr)), None)
    if at is None or len(scored) < 2:
        return None
    if not 0 < at < len(scored) - 1:
        return math.exp(scored[at][0]), False
    (x0, y0), (x1, y1), (x2, y2) = scored[at - 1 : at + 2]
    slopes = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    bend = (slopes[1] - slopes[0]) / (x2 - x0)
    if bend <= 0:
        return math.exp(x1), True
    lowest = (x0 + x1) / 2 - slopes[0] / (2 * bend)
    return math.exp(min(max(lowest, x0), x2)), True


def fit_all(groups: Sequence[Group]) -> list[Fit]:
    """Return every law with at least two points."""
    return [*_rates(groups), *_losses(groups)]


def fits_text(fits: Sequence[Fit]) -> str:
    """Return the laws and their suggested runs for a terminal, "" where there is none."""
    lines = ["Power laws"] if fits else []
    for fit in fits:
        law = fit.law
        interval = "" if math.isnan(law.low) else f" (95 %: {law.low:.3f} to {law.high:.3f})"
        lines.append(
            f"  {fit.name}, {fit.subject}: {fit.y_name} = {law.coefficient:.3g} · {fit.x_name}^{law.exponent:.3f}"
            f"{interval}, {law.points} points"
        )
        lines += [f"    {fit.caution}"] * bool(fit.caution)
        lines += [f"    python train.py {line}" for line in fit.overrides]
    return "\n".join(lines)


def families(groups: Sequence[Group], free: Sequence[str]) -> Iterator[tuple[dict[str, str], list[Group]]]:
    """Yield sets of groups that differ only by the keys in `free`, with the settings that they share."""
    families: dict[tuple[tuple[str, str], ...], list[Group]] = {}
    for group in groups:
        shared = tuple((k, v) for k, v in group.settings.items() if k not in free)
        families.setdefault(shared, []).append(group)
    for shared, members in families.items():
        if len(members) > 1:
            yield dict(shared), members


def lr_scale(run: RunRecord) -> float:
    """Return the factor by which the run's scaling rule multiplied its learning rate."""
    own = {k.removeprefix(SCALING): v for k, v in run.config.items() if k.startswith(SCALING)}
    rule = getattr(rules, str(own.pop("_target_", "")).rpartition(".")[2], None)
    settings = {key: value for key, value in own.items() if not key.startswith("_")}
    try:
        return 1.0 if rule is None else rule(int(run.config[BATCH]), **settings)
    except (ConfigError, TypeError):  # written by a version with other settings
        return 1.0


def _rates(groups: Sequence[Group]) -> Iterator[Fit]:
    """Fit the learning rates after scaling. Suggested runs therefore set `scaling=none`."""
    for shared, members in families(groups, [BATCH, "max_steps"]):
        scales = {float(g.runs[0].config[BATCH]): lr_scale(g.runs[0]) for g in members if BATCH in g.runs[0].config}
        found = [(float(g.runs[0].config[BATCH]), best_rate(g)) for g in members if BATCH in g.runs[0].config]
        rates = sorted((batch, (rate[0] * scales[batch], rate[1])) for batch, rate in found if rate is not None)
        points = [(batch, rate) for batch, (rate, _) in rates]
        law = power_law(*zip(*points, strict=True)) if points else None
        if law is None:
            continue
        edges = [f"{batch:.0f}" for batch, (_, is_inside) in rates if not is_inside]
        caution = (
            f"the best rate is the lowest or highest one tried for batch_tokens={','.join(edges)}; try rates beyond it"
            if edges
            else ""
        )
        wanted = [*(x for x, _ in points), 2 * points[-1][0], 4 * points[-1][0]]
        settings, is_scaled = shared, any(scale != 1 for scale in scales.values())
        if is_scaled:
            settings = {key: value for key, value in shared.items() if not key.startswith("scaling")}
            settings["scaling"] = "none"
        lines = [" ".join([*_settings(settings), f"{BATCH}={x:.0f}", f"optimizer.lr={law.at(x):.3g}"]) for x in wanted]
        yield Fit("best lr against batch", _subject(shared), BATCH, "optimizer.lr", points, law, lines, caution)


def _losses(groups: Sequence[Group]) -> Iterator[Fit]:
    sized = [key for group in groups for key in group.settings if key in SIZE_KEYS or key.startswith("model.")]
    length = ("max_steps", "max_tokens")
    for x_name, free in (("parameters", dict.fromkeys(sized)), ("FLOPs", dict.fromkeys([*sized, *length]))):
        for shared, members in families(groups, list(free)):
            points = sorted(point for group in members if (point := _measured(group, x_name)) is not None)
            law = power_law(*zip(*points, strict=True)) if points else None
            if law is None:
                continue
            best = min(members, key=lambda group: (math.isnan(group.best.mean), group.best.mean))
            rate = [] if best.best.lr is None else [f"optimizer.lr={best.best.lr:.3g}"]
            lines = [" ".join([*_settings(best.settings), *rate])]
            caution = "" if len(points) > 2 else "two points: no confidence interval"
            yield Fit(f"loss against {x_name}", _subject(shared), x_name, "val/loss", points, law, lines, caution)


def _measured(group: Group, x_name: str) -> tuple[float, float] | None:
    runs = [run for run in group.best.runs if run.state == "finished"]
    if not runs or not math.isfinite(group.best.mean):
        return None
    if x_name == "parameters":
        x = runs[0].summary.get("active_parameters")
    else:
        x = statistics.fmean((run.summary.get("tokens_seen") or 0) * run.flops_per_token for run in runs)
    return (float(x), group.best.mean) if x and math.isfinite(x) else None


def _settings(settings: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items() if value]


def _subject(shared: dict[str, str]) -> str:
    return " ".join(_settings(shared)) or "all runs"
