"""Generates text during training."""

import logging
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from llm.callbacks.rows import log_rows
from llm.contracts import ShardingStrategy
from llm.errors import ConfigError
from llm.run_folder.folder import RunFolder

log = logging.getLogger(__name__)


class Samples(Callback):
    """A callback that writes generated text to samples.txt after every few validations, and to the log at the end.

    Args:
        run_folder: the folder of samples.txt.
        every_validations: validations between samples, at least 1.
        prompts: texts to continue; an empty one starts a document.
        max_new_tokens: tokens per prompt.
        temperature: temperature of sampling; 0 takes the most likely token.
        top_k: number of most likely tokens to sample from, or None.
        top_p: sample from the smallest set whose probabilities sum to p, or None.
        seed: seed of the random numbers. It is the same for each sample, so that texts differ only by the weights.
    """

    def __init__(
        self,
        *,
        run_folder: RunFolder,
        every_validations: int,
        prompts: list[str],
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        seed: int,
    ) -> None:
        if every_validations < 1:
            raise ConfigError(f"callbacks.samples.every_validations={every_validations}: must be at least 1; try 1")
        if not prompts:
            raise ConfigError("callbacks.samples.prompts=[]: needs at least one; try [''] or callbacks.samples=null")
        self.run_folder, self.every_validations, self.prompts = run_folder, every_validations, prompts
        self.sampling = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
        }
        self._validations = 0
        self._sampled: tuple[int, str] = (-1, "")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Sample when it is due."""
        if trainer.sanity_checking:
            return
        self._validations += 1
        if self._validations % self.every_validations == 0:
            self._sample(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log a last sample, unless a signal stopped the run."""
        if trainer.global_step == trainer.max_steps:
            text = self._sample(trainer, pl_module)
            if trainer.is_global_zero:
                log.info("%s", text)

    def state_dict(self) -> dict[str, int]:
        """Return the number of validations."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the number of validations."""
        self._validations = state_dict["validations"]

    def _sample(self, trainer: L.Trainer, pl_module: Any) -> str:
        strategy = trainer.strategy
        if not (trainer.is_global_zero or (isinstance(strategy, ShardingStrategy) and strategy.forwards_together)):
            return ""
        step = trainer.global_step
        if self._sampled[0] != step:
            texts = pl_module.generate_text(self.prompts, **self.sampling)
            shown = [f"[{prompt!r}] {text}" for prompt, text in zip(self.prompts, texts, strict=True)]
            self._sampled = (step, f"--- step {step} ---\n" + "\n\n".join(shown) + "\n")
            self.run_folder.append_text("samples.txt", self._sampled[1] + "\n")
            rows = [[step, prompt, text] for prompt, text in zip(self.prompts, texts, strict=True)]
            log_rows(trainer, pl_module, "samples", ("step", "prompt", "text"), rows)
        return self._sampled[1]
