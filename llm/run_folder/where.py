"""Decides where a run folder lies, and removes one in which no run began."""

import logging
import os
import shutil
from pathlib import Path


def discard_empty(folder: Path) -> None:
    """Remove a run folder in which nothing but Hydra's own notes and a log stands: no run came of it."""
    # what another rank removes meanwhile, such as an old checkpoint, is passed over
    files = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    if all(path.parent.name == ".hydra" or path.suffix == ".log" for path in files):
        logging.shutdown()
        for handler in [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]:
            if Path(handler.baseFilename).is_relative_to(folder.absolute()):
                logging.getLogger().removeHandler(handler)  # it would open its file again
        shutil.rmtree(folder, ignore_errors=True)
