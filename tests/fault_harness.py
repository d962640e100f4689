"""Runs a command, injects a fault, and returns what is left. A new fault takes five lines:

def test_a_run_killed_by_ten_signals_resumes(fault, steady):
    fault.run(*LONG, kill=Kill(signal.SIGUSR1, at_step=7))
    outcome = fault.run(f"resume={fault.folder}")
    assert outcome.status == 0
    assert outcome.losses == steady
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from llm.run_folder.checkpoint_files import list_checkpoints, verify

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 240
"""Timeout of any command, in seconds."""


@dataclass(frozen=True)
class Kill:
    """A signal and its time: after a step appears in metrics.jsonl, or a moment after a checkpoint starts.

    Args:
        number: the signal.
        at_step: send it when this update is recorded.
        while_saving: send it this many seconds after the start of a checkpoint that is not the first.
        times: number of times it is sent, half a second apart.
        to_group: to every process of the command, as a terminal or a scheduler does.
    """

    number: signal.Signals = signal.SIGKILL
    at_step: int | None = None
    while_saving: float | None = None
    times: int = 1
    to_group: bool = False


@dataclass(frozen=True)
class Outcome:
    """The result of a command: its exit status, output, duration and run folder."""

    status: int
    out: str
    err: str
    seconds: float
    folder: Path

    @property
    def said(self) -> str:
        return self.out + self.err

    @property
    def losses(self) -> dict[int, str]:
        """Return the training loss of each step."""
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return {row["step"]: float(row["train/loss"]).hex() for row in rows}

    @property
    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def whole(self) -> list[int]:
        """Return the steps of the checkpoints whose checksums are correct."""
        return [step for step, path in list_checkpoints(self.folder / "checkpoints") if not verify(path)]

    @property
    def leftovers(self) -> list[str]:
        """Return the names of unfinished files and folders."""
        return [path.name for path in self.folder.rglob(".tmp-*")]


@dataclass
class Fault:
    """Runs train.py in one run folder, any number of times.

    Args:
        base: overrides that every new run gets; a command with resume= has none.
        cwd: the working directory.
        patch: Python code that every process of the command executes first, for faults inside the process.
        file_limit: largest size of a file in bytes, as with a quota or a full disk.
        environment: variables added to those of this process; None removes one.
        prefix: words before the command, such as `unshare -rn` for no network.
    """

    base: list[str]
    cwd: Path
    patch: str = ""
    file_limit: int | None = None
    environment: dict[str, str | None] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return self.cwd / "run"

    def run(self, *overrides: str, kill: Kill | None = None) -> Outcome:
        """Run train.py with these overrides, and send the signal of `kill` meanwhile."""
        own = [] if any(o.startswith("resume=") for o in overrides) else [*self.base, f"hydra.run.dir={self.folder}"]
        began = time.monotonic()
        command = [*self.prefix, sys.executable, str(self._script()), *own, *overrides]
        process = subprocess.Popen(
            command, cwd=self.cwd, env=self._environment(), text=True, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=self._limit,
        )  # fmt: skip
        try:
            if kill is not None:
                self._kill(process, kill)
            out, err = process.communicate(timeout=PATIENCE)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        return Outcome(process.returncode, out, err, time.monotonic() - began, self.folder)

    def _script(self) -> Path:
        if not self.patch:
            return ROOT / "train.py"
        script = self.cwd / "train.py"
        script.write_text(
            f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{self.patch}\n{(ROOT / 'train.py').read_text()}"
        )
        return script

    def _environment(self) -> dict[str, str]:
        asked = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | self.environment
        kept = {key: value for key, value in os.environ.items() if key not in asked}
        return kept | {key: value for key, value in asked.items() if value is not None}

    def _limit(self) -> None:
        if self.file_limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_limit, resource.RLIM_INFINITY))

    def _kill(self, process: subprocess.Popen, kill: Kill) -> None:
        self._await(process, kill)
        for n in range(kill.times):
            if n:
                time.sleep(0.5)
            if process.poll() is None:
                (os.killpg if kill.to_group else os.kill)(process.pid, kill.number)

    def _await(self, process: subprocess.Popen, kill: Kill) -> None:
        deadline = time.monotonic() + PATIENCE
        checkpoints = self.folder / "checkpoints"
        before = {path.name for path in checkpoints.glob(".tmp-step-*")}
        while time.monotonic() < deadline and process.poll() is None:
            if kill.at_step is not None and self.recorded() >= kill.at_step:
                return
            begun = {path.name for path in checkpoints.glob(".tmp-step-*")} - before
            if kill.while_saving is not None and begun and list_checkpoints(checkpoints):
                time.sleep(kill.while_saving)
                return
            time.sleep(0.001)
        raise AssertionError(f"the command ended before it was to be killed: {process.communicate()}")

    def recorded(self) -> int:
        """Return the newest step in metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def truncate(path: Path, *, by: int = 1) -> None:
    """Cut the last bytes off a file."""
    with open(path, "r+b") as file:
        file.truncate(max(0, path.stat().st_size - by))


def flip(path: Path, *, chance: random.Random) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
