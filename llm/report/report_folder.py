"""Writes a report folder with `leaderboard.csv` and `index.html`, and returns the text for a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from llm.errors import ConfigError
from llm.report.board import to_csv, to_text
from llm.report.findings import Findings, analyze
from llm.report.fits import fits_text
from llm.report.page import report_data, to_html
from llm.report.runs import RunReader
from llm.report.useful_batch import useful_text
from llm.run_folder.atomic_files import replace_text


@dataclass(frozen=True)
class Report:
    """The result of reading the folders once."""

    text: str
    page: Path
    is_open: bool
    """Whether a run or a sweep is still running."""


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
        folders: run folders, or folders that contain run folders.
        out: the report folder. None means `report/` in the first folder.
        target: loss in nats per token for "tokens to" and "time to". None means the final loss of the middle group.
        reader: a reader that has read these folders before, which then parses only new lines.
        refresh_seconds: seconds after which the page reloads itself, None for never.

    Raises:
        ConfigError: a folder is missing or contains no run, or `out` has other files of a report's names.
    """
    out = out or folders[0] / "report"
    _refuse_other_files(out)
    findings = analyze(folders, reader or RunReader(), target)
    made = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / "leaderboard.csv", to_csv(findings.rows))
    replace_text(out / "index.html", to_html(report_data(findings, made=made), refresh_seconds))
    return Report(report_text(findings), out / "index.html", findings.is_open)


def _refuse_other_files(out: Path) -> None:
    """Refuse a folder whose files of a report's names were not written by a report."""
    for name, mark in (("index.html", "<title>Crucible report</title>"), ("leaderboard.csv", "rank,group,lr,")):
        if (out / name).exists() and mark not in (out / name).read_text(encoding="utf-8", errors="replace")[:2000]:
            raise ConfigError(f"{out / name}: not written by a report; choose another folder with --out")


def report_text(findings: Findings) -> str:
    """Return the findings as text for a terminal."""
    states = findings.states
    counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    parts = [
        f"{len(states)} run{'s' * (len(states) != 1)}: {counts}" if states else "no run yet",
        to_text(findings.rows, findings.pairs, findings.target),
        fits_text(findings.fits),
        useful_text(findings.useful),
    ]
    return "\n\n".join(part for part in parts if part)
