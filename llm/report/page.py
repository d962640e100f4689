"""Builds the report page: one HTML file that needs no network."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from itertools import groupby
from typing import Any

from llm.report.findings import Findings
from llm.report.groups import Group, text_of
from llm.report.runs import Point, RunRecord
from llm.run_folder.atomic_files import json_value

MOST_POINTS = 400
"""Points per curve. Longer curves are averaged down to this number, so that the page stays small."""
MOST_TIMES = 120
"""Columns of a plot of expert load."""


def to_html(data: dict[str, Any], refresh_seconds: float | None = None) -> str:
    """Return the page.

    Args:
        data: the result of `report_data`.
        refresh_seconds: seconds after which the page reloads itself, None for never.
    """
    assets = files("llm.report")
    content = json.dumps(
        json_value(data | {"refresh_seconds": refresh_seconds}), separators=(",", ":"), allow_nan=False
    )
    page = assets.joinpath("page.html").read_text()
    for name in ("page.css", "chart.js", "page.js"):
        page = page.replace(f"/*{name}*/", assets.joinpath(name).read_text())
    return page.replace("/*data*/", content.replace("<", "\\u003c"))  # a "</script>" in the data cannot end the script


def report_data(findings: Findings, *, made: str) -> dict[str, Any]:
    """Return the contents of the page as plain dicts and lists.

    Args:
        findings: the contents of the report.
        made: date and time of the report.
    """
    runs, groups = findings.runs, findings.groups
    group_of = {id(run): index for index, group in enumerate(groups) for run in group.runs}
    best = {id(run) for group in groups for run in group.best.runs}
    shared = _shared(runs)
    return {
        "title": findings.title,
        "made": made,
        "target": findings.target,
        "rows": [asdict(row) for row in findings.rows],
        "groups": [_group(group) for group in groups],
        "runs": [
            _run(run, name, shared) | {"group": group_of.get(id(run)), "is_best": id(run) in best}
            for run, name in zip(runs, short_names(runs), strict=True)
        ],
        "shared": {key: text_of(value) for key, value in shared.items()},
        "pairs": [
            v.comparison._asdict() | {"first": v.first, "second": v.second, "p": v.p, "word": v.word}
            for v in findings.pairs
        ],
        "fits": [asdict(fit) | {"law": fit.law._asdict()} for fit in findings.fits],
        "useful": [asdict(u) | {"trade": u.trade and u.trade._asdict(), "lines": u.lines} for u in findings.useful],
        "states": findings.states,
        "is_open": findings.is_open,
    }


def _group(group: Group) -> dict[str, Any]:
    rates = [
        {"lr": cell.lr, "mean": cell.mean, "losses": list(cell.losses.values())} for cell in group.cells if cell.losses
    ]
    settings = [f"{key}={value}" for key, value in group.settings.items() if value]
    rate = [] if group.best.lr is None else [f"optimizer.lr={group.best.lr:.6g}"]
    return {"label": group.label, "settings": group.settings, "rates": rates, "overrides": " ".join([*settings, *rate])}


def short_names(runs: Sequence[RunRecord]) -> list[str]:
    """Return the folder name of each run, with as many parent folders as are needed to make the names distinct."""
    depth = max((len(run.folder.parts) for run in runs), default=1)
    tried = (["/".join(run.folder.parts[-n:]) for run in runs] for n in range(1, depth + 1))
    return next((names for names in tried if len({*names}) == len(names)), [str(run.folder) for run in runs])


def _given(run: RunRecord, key: str) -> float | None:
    """Return a number from the configuration, or from the job's overrides where the job failed before it had one."""
    given = [
        text.partition("=")[2] for text in run.job.get("overrides") or [] if text.lstrip("+").startswith(f"{key}=")
    ]
    try:
        return float(run.config[key] if key in run.config else next(reversed(given), ""))
    except (TypeError, ValueError):
        return None


def _run(run: RunRecord, name: str, shared: dict[str, Any]) -> dict[str, Any]:
    own = {
        key: text_of(value) for key, value in run.config.items() if key not in shared and not key.endswith("_partial_")
    }
    figures = {key: value for key, value in run.summary.items() if isinstance(value, int | float | str)}
    return {
        "name": name,
        "folder": str(run.folder),
        "overrides": " ".join(run.job.get("overrides") or []),
        "state": run.state,
        "reason": run.reason,
        "progress": run.progress,
        "seed": _given(run, "seed"),
        "lr": _given(run, "optimizer.lr"),
        "loss": run.loss if run.loss is not None else run.latest_loss,
        "flops_per_token": run.flops_per_token,
        "val": _columns(run.curve("val/loss")),
        "train": _columns(run.curve("train/loss")),
        "config": own,
        "has_config": bool(run.config),
        "figures": figures,
        "expert_load": _expert_load(run),
        "codebook": _codebook(run),
        "extrapolation": sorted(run.extrapolation.items()),
    }


def _shared(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the settings with the same value in all runs, which the page stores once."""
    configs = [run.config for run in runs if run.config]
    if not configs:
        return {}
    return {k: v for k, v in configs[0].items() if all(k in config and config[k] == v for config in configs)}


def _columns(points: Sequence[Point]) -> dict[str, list[float]]:
    """Return tokens, seconds and losses of a curve. Neighbours are averaged where there are too many points."""
    stride = math.ceil(len(points) / MOST_POINTS) or 1
    parts = [points[i : i + stride] for i in range(0, len(points), stride)]
    return {
        "tokens": [round(_mean([p.tokens for p in part])) for part in parts],
        "seconds": [round(_mean([p.seconds for p in part]), 3) for part in parts],
        "loss": [round(_mean([p.loss for p in part]), 5) for part in parts],
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _expert_load(run: RunRecord) -> list[dict[str, Any]]:
    """Return each layer's expert load relative to an even share, one row per expert, averaged to few columns."""
    layers = []
    for name in _names(run, "/expert_load_global"):
        lines = [line for line in run.lines if isinstance(line.get(name), list)]
        stride = math.ceil(len(lines) / MOST_TIMES) or 1
        parts = [lines[i : i + stride] for i in range(0, len(lines), stride)]
        experts = len(lines[0][name])
        load = [[round(experts * _mean([line[name][e] for line in part]), 3) for part in parts] for e in range(experts)]
        steps = [part[-1]["step"] for part in parts]
        layers.append({"layer": name.split("/")[-2], "load": load, "steps": steps})
    return layers


def _codebook(run: RunRecord) -> list[dict[str, Any]]:
    """Return each layer's share of codes in use at each number of tokens."""
    curves = []
    for name in _names(run, "/codebook_usage"):
        lines = [line for line in run.lines if isinstance(line.get(name), int | float) and "tokens_seen" in line]
        stride = math.ceil(len(lines) / MOST_POINTS) or 1
        kept = lines[::stride]
        curves.append(
            {"layer": name.split("/")[-2], "tokens": [x["tokens_seen"] for x in kept], "usage": [x[name] for x in kept]}
        )
    return curves


def _names(run: RunRecord, ending: str) -> list[str]:
    names = {name for line in run.lines for name in line if name.endswith(ending)}
    return sorted(names, key=lambda name: [int(text) if digit else text for digit, text in _digits(name)])


def _digits(name: str) -> list[tuple[bool, str]]:
    return [(digit, "".join(part)) for digit, part in groupby(name, str.isdigit)]
