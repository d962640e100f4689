"""From folders to a report folder: `leaderboard.csv`, `index.html`, and the text for a terminal."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from llm.report.board import default_target, leaderboard, to_csv, to_text, verdicts
from llm.report.fits import fit_all, fits_text
from llm.report.groups import LR, group_runs, swept_keys
from llm.report.page import report_data, to_html
from llm.report.runs import RunReader, find_runs
from llm.report.sweeps import pending_jobs
from llm.report.useful_batch import useful_batches, useful_text


@dataclass(frozen=True)
class Report:
    """What came of one look at the folders."""

    text: str
    page: Path
    is_open: bool
    """Whether something still runs."""


def write_report(
    folders: Sequence[Path],
    *,
    out: Path | None = None,
    target: float | None = None,
    reader: RunReader | None = None,
    refresh_seconds: float | None = None,
) -> Report:
    """Write the report of all runs in `folders`, finished or not.

    Args:
        folders: run folders, or folders that hold some.
        out: where it goes; None: `report/` in the first folder.
        target: loss in nats a token that tokens and seconds are counted to; None: what the middle group ended at.
        reader: one that has read these folders before, to be quick.
        refresh_seconds: after how many seconds the page loads itself anew, None for never.

    Raises:
        ConfigError: a folder that is missing or holds no run.
    """
    paths = find_runs(folders)
    reader = reader or RunReader()
    runs = [reader.read(path) for path in paths]
    groups = group_runs(runs, swept_keys(runs) or [LR])  # where nothing else differs, rates are what is compared
    goal = default_target(groups) if target is None else target
    rows, pairs, useful = leaderboard(groups, goal), verdicts(groups), useful_batches(groups)
    made = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    title = ", ".join(folder.absolute().name for folder in folders[:3]) + (" …" if len(folders) > 3 else "")
    ahead = pending_jobs(folders)
    states = [*(run.state for run in runs), *["pending"] * ahead.pending]
    is_open = ahead.is_open or "running" in states
    fits = fit_all(groups)
    data = report_data(runs, groups, rows, pairs, fits, useful, title=title, target=goal, made=made)
    data |= {"states": states, "is_open": is_open}
    out = out or folders[0] / "report"
    out.mkdir(parents=True, exist_ok=True)
    _replace(out / "leaderboard.csv", to_csv(rows))
    _replace(out / "index.html", to_html(data, refresh_seconds))
    told = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    counted = f"{len(states)} run{'s' * (len(states) != 1)}: {told}" if states else "no run yet"
    parts = [counted, to_text(rows, pairs, goal), fits_text(fits), useful_text(useful)]
    return Report("\n\n".join(part for part in parts if part), out / "index.html", is_open)


def _replace(path: Path, text: str) -> None:
    """Write in one step: a browser may be looking."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
