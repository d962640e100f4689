"""Runs evaluations during training, with the code of eval.py."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from llm.callbacks.rng_state import get_rng_state, set_rng_state
from llm.errors import ConfigError
from llm.evals.evaluation import Evaluation, Subject
from llm.run_folder.folder import RunFolder

log = logging.getLogger(__name__)


class Evaluations(Callback):
    """A callback that runs the evaluations of `eval=[…]` after every few validations; without a list it does nothing.

    The headline numbers are added to the line of their update in metrics.jsonl and in every logger, as
    `eval/<evaluation>/…`. All results of an evaluation are added to eval/<evaluation>.jsonl. Where training averages
    the weights, the average is evaluated, as in validation. Every rank evaluates, so that sharded weights can be
    gathered, and the first rank writes.

    Args:
        run_folder: the folder in which results are written.
        every_validations: validations between evaluations, at least 1.
        evaluations: the evaluations, by name.
        precision: precision of the run.
        open_source: see `llm.evals.evaluation.Subject`.
        source_files: likewise.

    Raises:
        ConfigError: an every_validations below 1.
    """

    def __init__(
        self,
        *,
        run_folder: RunFolder,
        every_validations: int,
        evaluations: Mapping[str, Evaluation],
        precision: str,
        open_source: Callable[[str, float | None], Any],
        source_files: tuple[str, ...],
    ) -> None:
        if every_validations < 1:
            raise ConfigError(f"callbacks.evaluations.every_validations={every_validations}: must be at least 1; try 1")
        self.run_folder, self.every_validations = run_folder, every_validations
        self.evaluations, self.precision = evaluations, precision
        self.open_source, self.source_files = open_source, source_files
        self._validations = 0
        self._found: tuple[int, dict[str, float]] = (-1, {})

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Evaluate when it is due, while averaged weights are still in the model."""
        if trainer.sanity_checking or not self.evaluations:
            return
        self._validations += 1
        if self._validations % self.every_validations:
            return
        step = trainer.global_step
        subject = Subject(
            name=f"step {step}",
            model=pl_module.model,
            objective=pl_module.objective,
            data=trainer.datamodule,  # pyright: ignore[reportAttributeAccessIssue]
            precision=self.precision,
            context_length=pl_module.context_length,
            open_source=self.open_source,
            source_files=self.source_files,
        )
        self._found = (step, self._evaluate(subject, step))

    def _evaluate(self, subject: Subject, step: int) -> dict[str, float]:
        found: dict[str, float] = {}
        random_state = get_rng_state()
        for name, evaluation in self.evaluations.items():
            result = evaluation(subject)
            found |= {f"eval/{name}/{key}": value for key, value in result.headline.items()}
            self.run_folder.append_record(f"eval/{name}.jsonl", {"step": step, "found": result.figures})
        set_rng_state(random_state)
        return found

    def validation_metrics(self, trainer: L.Trainer) -> dict[str, float]:
        """Return the headline numbers of this update for the recorder."""
        return self._found[1] if self._found[0] == trainer.global_step else {}

    def state_dict(self) -> dict[str, int]:
        """Return the number of validations."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the number of validations."""
        self._validations = state_dict["validations"]
