"""Going back to the newest good checkpoint and past the windows since then: rollbacks.json of a run folder."""

import json
import logging
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from llm.errors import CheckpointError, SpikeError
from llm.run_folder.checkpoint import find_last
from llm.run_folder.checkpoint_files import list_checkpoints
from llm.run_folder.folder import RunFolder, replace_text

log = logging.getLogger(__name__)

FILE = "rollbacks.json"
"""Objects `step` (the bad update, from 1), `why`, `to` (updates of the checkpoint), `left_out` (the run's numbers)."""


def read_rollbacks(folder: RunFolder) -> list[dict[str, Any]]:
    """Return what the run has gone back from so far.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder.path / FILE
    if not path.is_file():
        return []
    try:
        return [{**entry, "left_out": [int(n) for n in entry["left_out"]]} for entry in json.loads(path.read_text())]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path}: damaged, and without it the run would train on what it left out; restore it from a copy, or "
            "write [] into it to go on with what the checkpoint itself says"
        ) from error


def go_back(error: SpikeError, *, folder: RunFolder, data: Any, guard: Any) -> None:
    """Note where the run goes on: after the newest checkpoint that verifies, or from its beginning, past the windows.

    What the bad update and those since the checkpoint have read is left out. All ranks do as the first one finds.

    Args:
        error: the bad update.
        folder: the run's; no checkpoint is being written any more.
        data: has `numbers_of_steps(first, last) -> span`.
        guard: the `RollbackGuard`.

    Raises:
        SpikeError: the run has gone back as often as it may.
        CheckpointError: there are checkpoints, and none can be trusted.
    """
    done = read_rollbacks(folder)
    if len(done) >= guard.max_rollbacks:
        raise SpikeError(
            error.step,
            f"{error.why}; spikes.max_rollbacks={guard.max_rollbacks}: the run has gone back as often as it may; lower "
            "optimizer.lr in a new run, or resume with a higher spikes.max_rollbacks",
        ) from error
    step = from_first_rank(lambda: _newest(folder))
    first, stop = data.numbers_of_steps(step, error.step + guard.past)
    entry = {"step": error.step + 1, "why": error.why, "to": step, "left_out": [first, stop]}
    if folder.is_writer:
        replace_text(folder.path / FILE, json.dumps([*done, entry], indent=1) + "\n")
    folder.truncate_metrics(step)
    folder.update({"status": "running", "rollbacks": len(done) + 1})
    log.warning(
        "%s: back to step %d, past windows %d to %d of the run; rollback %d of at most %d",
        error, step, first, stop - 1, len(done) + 1, guard.max_rollbacks,
    )  # fmt: skip
    from_first_rank(lambda: 0)  # no rank reads the folder before the first has written it


def _newest(folder: RunFolder) -> int:
    """Return the updates of the newest checkpoint that verifies; 0 where the run has no checkpoint yet."""
    return find_last(folder.path).step if list_checkpoints(folder.checkpoints) else 0


def from_first_rank(find: Callable[[], int]) -> int:
    """Return what `find` gives on the first rank, on every rank; a CheckpointError there is raised on every rank."""
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
