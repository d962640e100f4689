"""Finds the launcher of this process, and starts one process per device where there is none."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

OWN_NAME = "train.py"
"""The name of a launch by `start_processes`."""

FAILURES = "CRUCIBLE_FAILURES"
"""Environment variable with the folder to which failing ranks write their reason."""

AT_START = dict(os.environ)
"""Environment variables of the launcher. Lightning removes some of them when a trainer ends."""

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Signals that stop a run. Slurm sends SIGUSR1 before a job's time ends (`--signal=USR1@120`)."""
SAME_SIGNAL_SECONDS = 0.3
"""Seconds within which a repeated signal counts once: a scheduler signals the group, and a launcher forwards it."""

PATIENCE = 10.0
"""Seconds after the failure of a rank in which other ranks may write their own reason, before they are killed."""


class Launch(NamedTuple):
    """The processes that a launcher started, from its environment variables."""

    name: str
    rank: int
    world_size: int
    devices: int
    """Processes on this node."""

    @property
    def local_rank(self) -> int:
        """Rank of this process on its node."""
        return self.rank % max(1, self.devices)

    @property
    def num_nodes(self) -> int:
        """Number of nodes with this many processes each."""
        return max(1, self.world_size // max(1, self.devices))


def find_launch(environment: Mapping[str, str] | None = None) -> Launch | None:
    """Return the launcher that started this process as one of several, None where there is none.

    torchrun, the deepspeed launcher, srun, and `python train.py trainer.devices=N` are recognized by their
    environment variables.
    """
    env = AT_START if environment is None else environment
    if "LOCAL_WORLD_SIZE" in env and "RANK" in env:
        name = "torchrun" if "TORCHELASTIC_RUN_ID" in env else OWN_NAME
        return Launch(name, int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"]))
    if "LOCAL_SIZE" in env and "RANK" in env:
        return Launch("deepspeed", int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_SIZE"]))
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        tasks = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
        nodes = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")))
        return Launch("srun", int(env["SLURM_PROCID"]), tasks, tasks // nodes) if tasks > 1 else None
    return None


def adopt(launch: Launch) -> None:
    """Set the environment variables that Lightning reads, where the launcher uses other names."""
    if launch.name == "deepspeed":
        os.environ.setdefault("NODE_RANK", str(launch.rank // launch.devices))


def start_processes(command: Sequence[str], *, processes: int) -> int:
    """Run `command` once per device of this machine, as ranks of one group; return the exit status.

    Signals are forwarded to every rank. When a rank fails, the others have PATIENCE seconds to fail too, and are then
    killed. The first failure is printed last.
    """
    with tempfile.TemporaryDirectory(prefix="crucible-") as notes, _port() as port:
        shared = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "NODE_RANK": "0",
            FAILURES: notes,
        }
        ranks = [
            subprocess.Popen(command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(processes)
        ]
        with _forwarding(ranks):
            first = _wait(ranks)
        if first is None:
            return 0
        status = ranks[first].returncode
        cause = first_failure(Path(notes))
        if status not in (2, *(128 + number for number in STOPPING)):
            sys.stderr.write(_describe(cause, first, status))
        return status if status > 0 else 128 - status


def _describe(cause: Mapping[str, Any] | None, rank: int, status: int) -> str:
    if status < 0:
        return f"error: rank {rank} was ended by {signal.Signals(-status).name}; the other ranks were stopped\n"
    if cause is None:
        return f"error: rank {rank} ended with status {status}; the other ranks were stopped\n"
    return f"{cause['trace']}error: rank {cause['rank']} failed first: {cause['message']}\n"


def _wait(ranks: list[Any]) -> int | None:
    """Wait for all ranks; return the index of the first that failed, None where none did."""
    first: int | None = None
    deadline = float("inf")
    while any(rank.poll() is None for rank in ranks):
        failed = [i for i, rank in enumerate(ranks) if rank.poll()]
        if failed and first is None:
            # if several ended at once, report one that a signal ended, because the others fail without it
            first = min(failed, key=lambda i: ranks[i].returncode)
            deadline = time.monotonic() + PATIENCE
        if time.monotonic() > deadline:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
        time.sleep(0.05)
    failed = [i for i, rank in enumerate(ranks) if rank.returncode]
    return first if first is not None else next(iter(failed), None)


@contextlib.contextmanager
def _forwarding(ranks: list[Any]) -> Iterator[None]:
    """Forward signals to the ranks, except Ctrl-C in a terminal, which sends it to them directly."""

    def hand_on(number: int, _: Any) -> None:
        for rank in ranks:
            if rank.poll() is None and not (number == signal.SIGINT and sys.stdin.isatty()):
                rank.send_signal(number)

    with signal_handler(hand_on):
        yield


@contextlib.contextmanager
def signal_handler(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Call `handler` for the signals that stop a run, and restore the former handlers at the end."""
    previous = {number: signal.signal(number, handler) for number in STOPPING}
    try:
        yield
    finally:
        for number, former in previous.items():
            signal.signal(number, former)


@contextlib.contextmanager
def _port() -> Iterator[int]:
    """Yield a port that is currently free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    yield port


def note_failure(error: BaseException) -> None:
    """Write the reason of this rank's failure to a file, for the process that started it."""
    folder = os.environ.get(FAILURES)
    if folder is None or not Path(folder).is_dir():
        return
    note = {
        "time": time.time(),
        "rank": int(os.environ.get("RANK", "0")),
        "message": next(iter(str(error).splitlines()), "") or type(error).__name__,
        "trace": "".join(traceback.format_exception(error)),
    }
    (Path(folder) / f"{note['rank']}.json").write_text(json.dumps(note))


def first_failure(folder: Path) -> dict[str, Any] | None:
    """Return the earliest reason."""
    notes = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return min(notes, key=lambda note: note["time"], default=None)
