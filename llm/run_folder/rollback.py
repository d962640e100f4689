"""Rolls a run back to its newest valid checkpoint and excludes the windows that were read since then."""

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch.distributed as dist

from llm.errors import CheckpointError, SpikeError
from llm.run_folder.atomic_files import replace_json
from llm.run_folder.checkpoint import find_last
from llm.run_folder.checkpoint_files import list_checkpoints
from llm.run_folder.folder import RunFolder

log = logging.getLogger(__name__)

FILE = "rollbacks.json"
"""File of a run folder that lists its rollbacks.

Each entry has `step` (the bad update, counted from 1), `why`, `to` (updates of the restored checkpoint), and `left_out`
(the first excluded window and the first one after them).
"""


@runtime_checkable
class WindowNumbers(Protocol):
    """Training data that knows which windows a range of updates reads."""

    def numbers_of_steps(self, first: int, last: int) -> Sequence[int]:
        """Return the number of the first window of these updates, and of the first window after them."""
        ...


@runtime_checkable
class RollbackLimits(Protocol):
    """Limits of `spikes=rollback`: updates to exclude after the bad one, and rollbacks per run."""

    past: int
    max_rollbacks: int


def read_rollbacks(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the run's rollbacks so far.

    Raises:
        CheckpointError: the file is corrupt.
    """
    path = folder.path / FILE
    if not path.is_file():
        return []
    try:
        return [{**entry, "left_out": [int(n) for n in entry["left_out"]]} for entry in json.loads(path.read_text())]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path}: the file is corrupt, and without it the run would train on the windows that it excluded; "
            "restore it from a copy, or write [] into it to use the list that the checkpoint stores"
        ) from error


def roll_back(error: SpikeError, *, folder: RunFolder, data: WindowNumbers, limits: RollbackLimits) -> None:
    """Record a rollback to the newest valid checkpoint, or to the start of a run that has no checkpoint.

    The windows that were read since that checkpoint are excluded, those of the bad update as well. The first rank
    chooses the checkpoint for all ranks.

    Args:
        error: the bad update.
        folder: the run folder. No checkpoint may be in the process of being written.
        data: the data module, which knows the windows of each step.
        limits: the limits of `spikes=rollback`.

    Raises:
        SpikeError: the run has already rolled back `spikes.max_rollbacks` times.
        CheckpointError: the run has checkpoints, and none of them is valid.
    """
    done = read_rollbacks(folder)
    if len(done) >= limits.max_rollbacks:
        raise SpikeError(
            error.step,
            f"{error.why}; spikes.max_rollbacks={limits.max_rollbacks}: the run has reached this limit; lower "
            "optimizer.lr in a new run, or resume with a higher spikes.max_rollbacks",
        ) from error
    step = from_first_rank(lambda: _newest(folder))
    first, stop = data.numbers_of_steps(step, error.step + limits.past)
    entry = {"step": error.step + 1, "why": error.why, "to": step, "left_out": [first, stop]}
    if folder.is_writer:
        replace_json(folder.path / FILE, [*done, entry])
    folder.truncate_metrics(step)
    folder.update({"status": "running", "rollbacks": len(done) + 1})
    log.warning(
        "%s: rolled back to step %d, windows %d to %d of the run are excluded; rollback %d of at most %d",
        error, step, first, stop - 1, len(done) + 1, limits.max_rollbacks,
    )  # fmt: skip
    from_first_rank(lambda: 0)  # a barrier: no rank reads the folder before the first rank has written to it


def _newest(folder: RunFolder) -> int:
    """Return the number of updates of the newest valid checkpoint, 0 where the run has no checkpoint yet."""
    return find_last(folder.path).step if list_checkpoints(folder.checkpoints) else 0


def from_first_rank(find: Callable[[], int]) -> int:
    """Return on every rank the result of `find` on the first rank, or raise the first rank's CheckpointError there."""
    if not (dist.is_available() and dist.is_initialized()):
        return find()
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [find()]
        except CheckpointError as error:
            answer = [str(error)]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], str):
        raise CheckpointError(answer[0])
    return answer[0]
