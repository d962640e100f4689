"""Runs under the harness's own command line: `python -m llm.harness --model crucible --model_args run_dir=…`.

All other arguments are those of `lm_eval`, which knows no models but its own until this module has been imported.
"""

import sys
from pathlib import Path

import torch
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

from llm.errors import CrucibleError
from llm.evals.harness import HarnessModel
from llm.training.rebuild import rebuild_model


class CrucibleLM(HarnessModel):
    """A run folder as a model of the harness.

    Args:
        run_dir: the run folder.
        checkpoint: last, best, or a folder name under checkpoints/.
        average: take the mean of the last so many checkpoints.
        max_length: tokens that are read at a time, or None for training's.
        batch_size: texts side by side.
        device: where to; None, or a GPU where there is none (the harness's own default), for what the run's trainer
            would choose here.
        max_batch_size: asked for by the harness; of no effect, since batch_size is never guessed.

    Raises:
        CrucibleError: no run, or a damaged one.
    """

    def __init__(
        self,
        run_dir: str,
        checkpoint: str = "last",
        average: int = 1,
        max_length: int | None = None,
        batch_size: int | str = 8,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None
        trained = rebuild_model(Path(run_dir), checkpoint, average=average, device=device)
        half = trained.precision == "bf16-mixed"
        super().__init__(
            trained.model,
            trained.tokenizer,
            max_length=max_length or trained.config.run.context_length,
            batch_size=int(batch_size),
            autocast=torch.autocast(trained.device.type, dtype=torch.bfloat16, enabled=half),
        )


def main() -> None:
    """Hand the command line to the harness."""
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
