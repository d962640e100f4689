"""Runs the harness's own command line on a run: `python -m llm.harness --model crucible --model_args run_dir=…`.

All other arguments are those of `lm_eval`, which knows the model `crucible` only after this module is imported.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

from llm.contracts import CAUSAL
from llm.errors import ConfigError, CrucibleError, did_you_mean
from llm.evals.harness import HarnessModel
from llm.training.rebuild import rebuild_model

KEYS = ("run_dir", "checkpoint", "average", "max_length")
"""Keys that --model_args accepts."""


class CrucibleLM(HarnessModel):
    """A run folder as a model of the harness.

    Args:
        run_dir: the run folder.
        checkpoint: last, best, or a folder name under checkpoints/.
        average: number of last checkpoints to average.
        max_length: tokens per window, or None for the training length.
        batch_size: texts per forward pass, or auto.
        device: device name; None chooses as the run's trainer would. The harness's default, a GPU, counts as None
            where there is no GPU.
        max_batch_size: passed by the harness; the largest batch of batch_size=auto.
        unknown: keys that are refused with a suggestion.

    Raises:
        CrucibleError: the run is missing or incomplete, or an argument is invalid.
    """

    def __init__(
        self,
        run_dir: str | None = None,
        checkpoint: str = "last",
        average: int | str = 1,
        max_length: int | str | None = None,
        batch_size: int | str = 8,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        for key, value in unknown.items():
            raise ConfigError(f"--model_args={key}={value}: unknown key{did_you_mean(key, KEYS)}; use one of {KEYS}")
        if run_dir is None:
            raise ConfigError("--model_args: run_dir is missing; add run_dir=runs/<folder>")
        mean_of, length = _count("average", average), _count("max_length", max_length)
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None
        trained = rebuild_model(Path(str(run_dir)), str(checkpoint), average=mean_of or 1, device=device)
        if trained.objective.sight != CAUSAL:
            raise ConfigError(
                f"--model_args=run_dir={run_dir}: the harness scores each token from those before it, and "
                f"objective={trained.objective.name} is not trained to; use a run of objective=next_token"
            )
        half = trained.precision == "bf16-mixed"
        super().__init__(
            trained.model,
            trained.tokenizer,
            max_length=length or trained.config.run.context_length,
            batch_size=batch_size,
            autocast=torch.autocast(trained.device.type, dtype=torch.bfloat16, enabled=half),
        )
        if max_batch_size is not None and str(batch_size).startswith("auto"):
            self.batch_size = min(self.batch_size, max_batch_size)


def _count(key: str, value: Any) -> int | None:
    """Return a count from --model_args, or raise ConfigError for what is no whole number of at least 1."""
    if value is None:
        return None
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"--model_args={key}={value}: must be a whole number of at least 1")
    return value


def main() -> None:
    """Run the harness's command line, and print errors of this project as one line."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    try:
        cli_evaluate()
    except CrucibleError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except ValueError as error:
        if not str(error).startswith("Tasks not found: "):
            raise
        sys.stderr.write(
            f"error: --tasks={str(error).split(': ')[1]}: no such task; name one that `ls tasks` lists, or put its "
            "file into --include_path\n"
        )
        sys.exit(2)


register_model("crucible")(CrucibleLM)
