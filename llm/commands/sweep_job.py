"""Runs the jobs of a sweep for Hydra's launchers, each with its own notes, log and console."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from llm.config.files import load, to_plain
from llm.config.resume import merge_resumed
from llm.sweep.job import run_job
from llm.sweep.sweep_plan import SweepPlan

Task = Callable[[Any, Path], float | None]


@dataclass(frozen=True)
class JobFunction:
    """The function that Hydra's launchers call for each job: here, in workers or on other machines, hence picklable.

    Args:
        plan: settings that all jobs share.
        task: runs a job in the caller's process; None if each job has its own process.
        check: makes the first argument of `task` from a job's plain configuration.
    """

    plan: SweepPlan
    task: Task | None
    check: Callable[[dict[str, Any]], Any]

    def __call__(self, cfg: DictConfig) -> float | None:
        own = HydraConfig.get()
        folder = Path(own.runtime.output_dir)
        here = None if self.task is None else partial(self._here, self.task, self.check, cfg)
        value = run_job(self.plan, tuple(map(str, own.overrides.task)), folder, here)
        if folder.is_dir() and not any(folder.iterdir()) and folder.stat().st_ctime >= self.plan.started:
            folder.rmdir()  # Hydra created it, but the job has another folder
        return value

    @staticmethod
    def _here(
        task: Task, check: Callable[[dict[str, Any]], Any], cfg: DictConfig, path: Path, is_resumed: bool
    ) -> float | None:
        plain = to_plain(cfg)
        if is_resumed:
            plain = merge_resumed(load(path / "config.yaml"), plain | {"resume": str(path)}, [f"resume={path}"])
        with _hydra_notes(cfg, path):
            return task(check(plain), path)


@contextlib.contextmanager
def _hydra_notes(cfg: DictConfig, path: Path) -> Iterator[None]:
    """Write Hydra's notes and the log of a job into the job's own folder.

    Hydra itself would write them into a folder of its choice, before it is known whether that folder is free.
    """
    own = HydraConfig.get()
    (path / ".hydra").mkdir(exist_ok=True)
    notes = {"config": cfg, "hydra": OmegaConf.create({"hydra": own}), "overrides": own.overrides.task}
    for name, note in notes.items():
        OmegaConf.save(note, path / ".hydra" / f"{name}.yaml")
    handler = logging.FileHandler(path / f"{own.job.name}.log")
    with logging_restored():
        for logger in _loggers():  # Hydra's configuration without a log has disabled them
            logger.disabled = False
        logging.getLogger().handlers = [handler]
        logging.getLogger().setLevel(logging.INFO)
        yield
    handler.close()


@contextlib.contextmanager
def logging_restored() -> Iterator[None]:
    """Restore the handlers, the level and the disabled loggers at the end, which Hydra configures for the process."""
    root = logging.getLogger()
    level, handlers, disabled = root.level, root.handlers[:], {logger: logger.disabled for logger in _loggers()}
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers = handlers
        for logger, is_disabled in disabled.items():
            logger.disabled = is_disabled


def _loggers() -> list[logging.Logger]:
    return [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
