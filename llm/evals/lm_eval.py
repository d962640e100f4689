"""Evaluates a model on tasks of EleutherAI's harness."""

import logging
import os
from pathlib import Path
from typing import Any

from llm.errors import ConfigError, did_you_mean
from llm.evals.evaluation import Result, Subject, require_causal

BOOTSTRAP_SAMPLES = 1000
"""Resamples for the standard error of measures without a closed form: about 2 % error, within seconds."""


class LMEval:
    """An evaluation that runs tasks of EleutherAI's harness, its own and those in a folder of the user.

    Args:
        tasks: names of tasks.
        include_path: a folder with YAML files of more tasks, or None.
        num_fewshot: examples before each question, or None for the task's own number.
        limit: most questions per task, or None for all.
        batch_size: texts per forward pass, at least 1, or `auto` for as many as fit in memory.

    Raises:
        ConfigError: `lm_eval` is not installed, a task does not exist, or include_path is not a folder.

    Source: Gao et al., "A framework for few-shot language model evaluation", zenodo.10256836.
    """

    def __init__(
        self,
        *,
        tasks: list[str],
        include_path: str | None,
        num_fewshot: int | None,
        limit: int | None,
        batch_size: int | str,
    ) -> None:
        if not tasks:
            raise ConfigError("eval.lm_eval.tasks=[]: names no task; try [lambada_openai]")
        if include_path is not None and not Path(include_path).is_dir():
            raise ConfigError(f"eval.lm_eval.include_path={include_path}: no such folder; name one with task files")
        self.tasks, self.include_path = tasks, include_path
        self.num_fewshot, self.limit, self.batch_size = num_fewshot, limit, batch_size

    def __call__(self, subject: Subject) -> Result:
        """Run the tasks on the subject."""
        try:
            from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
            from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

            from llm.evals.harness import HarnessModel
        except ImportError as error:
            raise ConfigError("eval=lm_eval: the package is not installed; pip install '.[eval]'") from error
        require_causal(subject, "eval=lm_eval")
        manager = TaskManager(include_path=self.include_path)
        check_tasks(self.tasks, manager.all_tasks)
        model = HarnessModel(
            subject.model,
            subject.data.tokenizer,
            max_length=subject.context_length,
            batch_size=self.batch_size,
            autocast=subject.autocast(),
        )
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # otherwise each bootstrap starts a process per core
        found: Any = simple_evaluate(
            model=model,
            tasks=list(self.tasks),
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=BOOTSTRAP_SAMPLES,
        )
        return _result(found["results"], found.get("n-samples", {}))


def check_tasks(tasks: list[str], known: list[str]) -> None:
    """Raise ConfigError for names that are no task of the harness."""
    problems = [f"eval.lm_eval.tasks={name}: no such task{did_you_mean(name, known)}" for name in tasks]
    missing = [line for name, line in zip(tasks, problems, strict=True) if name not in known]
    if missing:
        remedy = "name one of the harness's, or put its file into eval.lm_eval.include_path"
        raise ConfigError("\n".join(f"{line}; {remedy}" for line in missing))


def _result(results: dict[str, dict[str, Any]], counts: dict[str, Any]) -> Result:
    """Return a table of tasks and their measures."""
    rows, headline = [], {}
    for task, measures in results.items():
        for name, value in measures.items():
            metric, _, variant = name.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or not variant:
                continue
            error = measures.get(f"{metric}_stderr,{variant}")
            shown = f"{error:.4f}" if isinstance(error, int | float) else "-"
            count = counts.get(task, {}).get("effective", "-")
            rows.append([task, metric, f"{value:.4f}", shown, str(count)])
            headline[f"{task} {metric}"] = float(value)
    header = ["task", "measure", "value", "standard error", "questions"]
    return Result(headline=headline, figures=results, header=header, rows=rows)
