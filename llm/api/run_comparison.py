"""Compares runs: the leaderboard and the tests of a report."""

import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm.api.run_view import Run
from llm.errors import ConfigError
from llm.report.findings import Findings, analyze
from llm.report.report_folder import report_text, write_report
from llm.report.runs import RunReader


class RunComparison:
    """Runs grouped by their settings, best group first. It prints as the table of `python -m llm.report`.

    Args:
        folders: the folders of the runs.
        findings: what the report computed from them.
    """

    def __init__(self, folders: list[Path], findings: Findings) -> None:
        self.folders, self.findings = folders, findings

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One mapping per group: rank, group, lr, loss, standard_error, seeds, bits_per_byte and further figures."""
        return [asdict(row) for row in self.findings.rows]

    def write(self, out: str | os.PathLike[str]) -> Path:
        """Write leaderboard.csv and index.html to a folder; return the page."""
        return write_report(self.folders, out=Path(out), target=self.findings.target).page

    def __repr__(self) -> str:
        return report_text(self.findings)


def compare(runs: Iterable[Run | str | os.PathLike[str]], *, loss: float | None = None) -> RunComparison:
    """Compare runs, finished or not: which setting is best, by how much, and whether that is more than noise.

    Args:
        runs: runs, run folders, or folders that contain run folders, such as a sweep's.
        loss: loss in nats per token to which tokens and seconds are counted; None for the final loss of the middle
            group.

    Raises:
        ConfigError: no run is given, or a folder is missing or contains no run.
    """
    if isinstance(runs, str | os.PathLike | Run):
        runs = [runs]
    folders = [run.folder if isinstance(run, Run) else Path(run).expanduser() for run in runs]
    if not folders:
        raise ConfigError("runs=[]: nothing to compare; name run folders, as in llm.compare(['runs/a', 'runs/b'])")
    return RunComparison(folders, analyze(folders, RunReader(), loss))
