"""Removes a run folder in which no run started."""

import logging
import os
import shutil
from pathlib import Path


def discard_empty(folder: Path) -> None:
    """Remove a run folder that contains only Hydra's notes and log files, because no run started in it."""
    # another rank may remove files at the same time, which os.walk tolerates
    files = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    if all(path.parent.name == ".hydra" or path.suffix == ".log" for path in files):
        logging.shutdown()
        for handler in [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]:
            if Path(handler.baseFilename).is_relative_to(folder.absolute()):
                logging.getLogger().removeHandler(handler)  # otherwise it would create its file again
        shutil.rmtree(folder, ignore_errors=True)
