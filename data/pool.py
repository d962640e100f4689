"""Runs the pieces of a job over several worker processes, with a progress bar."""

import contextlib
import json
import os
import pickle
import queue
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, Any

from data.worker import Job, tokenize_piece
from llm.errors import DataError

_MIN_PARALLEL_BYTES = 1 << 21  # below this, starting workers takes longer than they save


def tokenize(job: Job, num_processes: int | None) -> list[dict[str, Any]]:
    """Run every piece, in this process where the corpus is small; return the results in the order of the pieces."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    total = sum(piece.size for piece in job.pieces)
    is_small = total < _MIN_PARALLEL_BYTES and num_processes is None
    wanted = 1 if is_small else min(num_processes or _cores(), len(job.pieces))
    columns = ("Tokenising", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("tokens", total=total if any(piece.paths for piece in job.pieces) else None)

        def advance(size: int) -> None:
            progress.advance(task, size)

        if wanted <= 1:
            return [tokenize_piece(job, index, advance) for index in range(len(job.pieces))]
        return _run_workers(job, wanted, advance)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_workers(job: Job, num_processes: int, advance: Callable[[int], None]) -> list[dict[str, Any]]:
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(job.pieces)):
        todo.put(index)
    payload = pickle.dumps(job)
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": _python_path()}
    command = [sys.executable, "-P", "-m", "data.worker"]  # -P: the working directory may have a folder named data
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        for _ in range(num_processes)
    ]
    results: list[dict[str, Any]] = [{} for _ in job.pieces]
    stopped = threading.Event()

    def drive(worker: subprocess.Popen[bytes]) -> None:
        try:
            _converse(worker, payload, todo, results, advance, stopped)
        except BaseException:
            stopped.set()
            raise

    try:
        with ThreadPoolExecutor(num_processes) as pool:
            try:
                futures = [pool.submit(drive, worker) for worker in workers]
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                for worker in workers:
                    worker.kill()
                raise
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    return results


def _converse(
    worker: subprocess.Popen[bytes],
    payload: bytes,
    todo: "queue.SimpleQueue[int]",
    results: list[dict[str, Any]],
    advance: Callable[[int], None],
    stopped: threading.Event,
) -> None:
    """Send one worker piece after piece until none remains."""
    requests, answers = _pipes(worker)
    with contextlib.suppress(BrokenPipeError):
        requests.write(struct.pack("<Q", len(payload)) + payload)
    while not stopped.is_set():
        try:
            index = todo.get_nowait()
        except queue.Empty:
            return
        with contextlib.suppress(BrokenPipeError):
            requests.write(f"{index}\n".encode())
            requests.flush()
        while not results[index]:
            line = answers.readline()
            if not line:
                raise DataError(
                    f"loader.num_processes: a tokenising process ended with status {worker.wait()}; see above"
                )
            answer = json.loads(line)
            if "error" in answer:
                raise DataError(answer["error"])
            advance(answer["progress"])
            results[index] = answer.get("result", {})


def _pipes(worker: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    return worker.stdin, worker.stdout


def _python_path() -> str:
    root = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join([root, *filter(None, sys.path)])
