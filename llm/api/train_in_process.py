"""Trains a run inside a Python session."""

import os
import signal
import sys
from contextlib import AbstractContextManager
from pathlib import Path

from llm.api.configuration import Configuration
from llm.api.process_state import process_state_restored
from llm.api.run_view import Run
from llm.api.session_output import run_logged, show_picture
from llm.commands.in_process import ComposedRun
from llm.config.conf import entry_script
from llm.config.quoting import quote
from llm.distributed.launch import adopt, find_launch, start_processes
from llm.distributed.rendezvous import agree
from llm.errors import ConfigError, CrucibleError
from llm.ops.allocator import return_freed_memory
from llm.run_folder.folder import RunFolder
from llm.run_folder.ownership import HYDRA_NOTES, discard_empty, remember_contents
from llm.training import train as training

SIGNAL_STATUS = 128
"""Exit status of a process that signal n ended, minus n."""


def train_in_process(config: Configuration) -> Run:
    """Train a run and return it. Log lines appear in the session, and a notebook shows the curves at the end.

    The state of the process is restored afterwards: seeds, environment variables, signal handlers, loggers, warning
    filters and torch's flags. A signal that arrives during the run saves a checkpoint after the current update. The
    handler that the session had for the signal is called then: an interrupted cell raises KeyboardInterrupt, and
    `llm.train(llm.compose("resume=<run folder>"))` continues the run.

    Args:
        config: the result of `llm.compose`.

    Raises:
        ConfigError: the configuration only plans, or the folder has another run.
        CrucibleError: an error of the data, the checkpoint or the training, as on the command line.
        KeyboardInterrupt: the run was interrupted; its checkpoint is saved.
    """
    if not isinstance(config, Configuration):
        raise ConfigError(f"{config!r:.60}: not a configuration; write llm.train(llm.compose('max_steps=200'))")
    composed = config.composed
    if composed.checked.run.plan:
        raise ConfigError("plan=true: trains nothing; print the plan with print(llm.compose(...).plan())")
    launch = find_launch()
    folder = composed.new_folder()
    if launch is not None:
        adopt(launch)
        folder = Path(agree(str(folder), launch))
    if composed.resumed is None:
        RunFolder(folder, is_writer=False).check_free(*HYDRA_NOTES)
    if launch is None and composed.checked.sizes.world_size > 1:
        stop = _train_in_processes(composed, folder)
    else:
        stop = _train_here(composed, folder, is_first=launch is None or launch.rank == 0)
    if stop is not None:
        signal.raise_signal(stop)
    show_picture(folder / "curves.png")
    return Run(folder)


def _train_here(composed: ComposedRun, folder: Path, *, is_first: bool) -> signal.Signals | None:
    """Train in this process; return the signal that stopped the run, None where none did."""
    remember_contents(folder)
    with process_state_restored():
        try:
            with _opened(composed, folder, is_first=is_first):
                training.train(composed.checked, folder)
        except SystemExit as error:
            return _signal_of(error.code if isinstance(error.code, int) else 1)
        except (CrucibleError, KeyboardInterrupt):
            discard_empty(folder)
            raise
        finally:
            return_freed_memory()
    return None


def _opened(composed: ComposedRun, folder: Path, *, is_first: bool) -> AbstractContextManager[None]:
    """Create the folder of a run with Hydra's notes; return the context in which the run is logged there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_first and composed.resumed is None:
            composed.write_notes(folder)
        return run_logged(folder)
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}"
        raise ConfigError(f"hydra.run.dir: {reason}; choose a folder that you may write to") from error


def _train_in_processes(composed: ComposedRun, folder: Path) -> signal.Signals | None:
    """Train in one process per device, as `python train.py` does; return the signal that stopped the run."""
    place = [f"hydra.run.dir={quote(str(folder))}"] if composed.resumed is None else []
    command = [sys.executable, str(entry_script("train")), *composed.line.overrides, *composed.line.flags, *place]
    with process_state_restored():
        root = str(Path(training.__file__).parents[2])
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        status = start_processes(command, processes=composed.checked.sizes.world_size)
    if status in (0, *(SIGNAL_STATUS + number for number in signal.valid_signals())):
        return _signal_of(status) if status else None
    raise CrucibleError(f"hydra.run.dir={folder}: a rank ended with status {status}; its error is printed above")


def _signal_of(status: int) -> signal.Signals:
    """Return the signal that an exit status states; an exit without one comes from a second interrupt."""
    return signal.Signals(status - SIGNAL_STATUS) if status > SIGNAL_STATUS else signal.SIGINT
