"""`python -m llm.report FOLDER …`: the best setting, its margin, and whether the margin exceeds noise."""

import argparse
import sys
import time
from pathlib import Path

from llm.errors import CrucibleError
from llm.report.report_folder import write_report
from llm.report.runs import RunReader


def main() -> None:
    """Write the report once, or repeatedly while runs continue."""
    parser = argparse.ArgumentParser(
        prog="python -m llm.report",
        description="Read run folders, finished or not, and write report/leaderboard.csv and report/index.html.",
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, help="run folders, or folders that contain some, such as a sweep's"
    )
    parser.add_argument("--out", type=Path, help="folder of the report (report/ in the first folder)")
    parser.add_argument("--loss", type=float, help="count tokens and seconds to this loss (the middle setting's final)")
    parser.add_argument(
        "--watch",
        type=float,
        metavar="SECONDS",
        help="write the report again after this many seconds until all runs end",
    )
    arguments = parser.parse_args()
    reader = RunReader()
    try:
        while True:
            report = write_report(
                arguments.folders,
                out=arguments.out,
                target=arguments.loss,
                reader=reader,
                refresh_seconds=arguments.watch,
            )
            sys.stdout.write(f"{report.text}\n\n{report.page}\n")
            sys.stdout.flush()
            if not arguments.watch or not report.is_open:
                return
            time.sleep(arguments.watch)
    except CrucibleError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
