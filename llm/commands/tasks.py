"""The work and the check of each command, which import torch and Lightning when they are called.

The command line answers `--help` and a mistake in a key before it needs either.
"""

import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def check_training(cfg: dict[str, Any]) -> Any:
    """Validate a plain configuration of train.py; see `llm.config.check.check`."""
    from llm.config.check import check
    from llm.ops.light_start import without_compiler

    with without_compiler():
        return check(cfg)


def run_training(checked: Any, folder: Path) -> float | None:
    """Train in `folder`, or print the plan of the run, which needs no Lightning; see `llm.training.train.train`."""
    if checked.run.plan:
        from llm.ops.light_start import without_compiler
        from llm.training.plan import describe_plan

        with without_compiler():
            log.info(describe_plan(checked))
        return None
    from llm.training.train import train

    return train(checked, folder)


def check_evaluation(cfg: dict[str, Any]) -> Any:
    """Validate a plain configuration of eval.py; see `llm.commands.evaluate.check_eval`."""
    from llm.commands.evaluate import check_eval

    return check_eval(cfg)


def run_evaluation(checked: Any, folder: Path) -> Any:
    """Evaluate in `folder`; see `llm.commands.evaluate.evaluate`."""
    from llm.commands.evaluate import evaluate

    return evaluate(checked, folder)
