"""Opens a run folder: its figures, its model, generation and evaluation."""

import html
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, overload

from llm.api.configuration import compose
from llm.api.displayed import Outcome, Picture
from llm.api.metric_columns import MetricColumns, metric_columns
from llm.api.process_state import process_state_restored
from llm.callbacks.curves import draw_curves
from llm.commands.evaluate import judge, load_subject, table_of
from llm.commands.in_process import composed_defaults, composed_evaluation
from llm.commands.talk import TalkConfig, check_lengths, check_talk, half_precision
from llm.config.files import load as load_config
from llm.config.pieces import instantiate
from llm.config.quoting import quote
from llm.config.signatures import suggest
from llm.errors import ConfigError
from llm.generate import generate_text
from llm.model.transformer import Transformer
from llm.run_folder.folder import RunFolder
from llm.training.rebuild import TrainedModel, checkpoint_folder, rebuild_model

HEADLINES = ("status", "val/loss", "bits_per_byte", "steps", "tokens_seen", "parameters", "tokens_per_second")
"""Figures of summary.json that a notebook shows for a run."""


class LoadedModel(NamedTuple):
    """A trained decoder in evaluation mode, and its tokenizer."""

    model: Transformer
    tokenizer: Any


class Run:
    """A run folder, finished or not. Figures are read from the folder each time, so they follow a run that trains.

    Args:
        folder: the run folder.

    Raises:
        ConfigError: the folder holds no run.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser().absolute()
        if not (self.folder / "config.yaml").is_file():
            raise ConfigError(f"{folder}: holds no config.yaml; name a run folder, such as runs/<folder>")
        self._trained: tuple[tuple[Path, int, str | None], TrainedModel] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration of config.yaml."""
        return load_config(self.folder / "config.yaml")

    @property
    def summary(self) -> dict[str, Any]:
        """The figures of summary.json: `val/loss`, `status` and others; None for a figure that is not known yet."""
        return self._files.read_summary()

    @property
    def metrics(self) -> MetricColumns:
        """One array per metric of metrics.jsonl, by its full name; `metrics.to_pandas()` returns a DataFrame."""
        return metric_columns(self._files.read_metrics())

    def load(self, checkpoint: str = "last", *, average: int = 1, device: str | None = None) -> LoadedModel:
        """Return the trained decoder and its tokenizer.

        Args:
            checkpoint: `last`, `best`, or the name of a folder in `checkpoints/`.
            average: number of checkpoints, this one and those before it, whose mean is loaded.
            device: device of the model; None for the one that the run's trainer would choose here.

        Raises:
            CheckpointError: the checkpoint is missing, corrupt, or of another model.
        """
        with process_state_restored():
            trained = rebuild_model(self.folder, checkpoint, average=average, device=device)
        return LoadedModel(trained.model, trained.tokenizer)

    @overload
    def generate(self, prompts: str, *, checkpoint: str = ..., average: int = ..., **sampling: Any) -> str: ...
    @overload
    def generate(
        self, prompts: list[str], *, checkpoint: str = ..., average: int = ..., **sampling: Any
    ) -> list[str]: ...
    def generate(
        self, prompts: str | list[str], *, checkpoint: str = "last", average: int = 1, **sampling: Any
    ) -> str | list[str]:
        """Return each prompt with its continuation.

        Args:
            prompts: one text or several, which are continued in one batch.
            checkpoint: see `load`.
            average: see `load`.
            sampling: settings of conf/generate.yaml: max_new_tokens, temperature, top_k, top_p, repetition_penalty,
                stop, seed, use_cache, steps.

        Raises:
            ConfigError: an unknown or invalid setting, or a text beyond the reach of the position.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        config = _sampling(self.folder, sampling)
        with process_state_restored():
            trained = self._model(checkpoint, average)
            check_lengths(trained, texts, config.max_new_tokens)
            with half_precision(trained):
                options = {"tokenizer": trained.tokenizer, "decode": trained.objective.decode}
                done = generate_text(trained.model, texts, **options, **config.sampling)
        return done[0] if isinstance(prompts, str) else done

    def evaluate(self, evaluation: str, *overrides: str, checkpoint: str = "last", average: int = 1) -> Outcome:
        """Return the result of one evaluation, and write it to `eval/` in the run folder as `eval.py` does.

        Args:
            evaluation: an option of conf/eval, such as "loss".
            overrides: further arguments of `python eval.py`, such as "eval.loss.stride=64".
            checkpoint: see `load`.
            average: see `load`.

        Raises:
            ConfigError: every mistake that the command line would report, one line each.
        """
        own = [f"run_dir={quote(str(self.folder))}", f"eval=[{evaluation}]", f"checkpoint={quote(checkpoint)}"]
        config = composed_evaluation([*own, f"average={average}", *overrides])
        out = self.folder / "eval"
        with process_state_restored():
            subject = load_subject(config, self.folder, checkpoint)
            name, result = next(iter(judge(subject, instantiate(config.eval), out).items()))
        picture = out / f"{name}.png"
        text = "\n".join(part for part in (table_of(result), result.text) if part)
        drawing = Picture.read(picture) if result.draw else None
        return Outcome(figures=result.figures, headline=result.headline, text=text, picture=drawing)

    def resume(self, *overrides: str) -> "Run":
        """Continue the run with `llm.train` and return it.

        Args:
            overrides: settings that a resumed run may change, such as "max_steps=400".
        """
        from llm.api.train_in_process import train_in_process  # which returns a Run

        return train_in_process(compose(f"resume={quote(str(self.folder))}", *overrides))

    def plot(self) -> Picture:
        """Return the curves of loss, learning rate, gradient norm and throughput, which a notebook displays."""
        with tempfile.TemporaryDirectory() as folder:
            draw_curves(self._files.read_metrics(), Path(folder, "curves.png"))
            return Picture.read(Path(folder, "curves.png"))

    @property
    def _files(self) -> RunFolder:
        return RunFolder(self.folder, is_writer=False)

    def _model(self, checkpoint: str, average: int) -> TrainedModel:
        """Return the trained model, which is kept for further calls with the same checkpoint."""
        key = (checkpoint_folder(self.folder, checkpoint), average, None)
        if self._trained is None or self._trained[0] != key:
            self._trained = (key, rebuild_model(self.folder, checkpoint, average=average))
        return self._trained[1]

    def __repr__(self) -> str:
        loss = self.summary.get("val/loss")
        figures = "" if loss is None else f", val/loss {loss:.4f}"
        return f"<Run {self.folder.name}: {self.summary.get('status') or 'not started'}{figures}>"

    def _repr_html_(self) -> str:
        rows = [(name, self.summary.get(name)) for name in HEADLINES]
        cells = [f"<tr><td>{name}</td><td>{html.escape(_shown(value))}</td></tr>" for name, value in rows]
        return f"<table><caption>{html.escape(str(self.folder))}</caption>{''.join(cells)}</table>"


def open_run(folder: str | os.PathLike[str]) -> Run:
    """Return the run in a run folder, finished or not.

    Raises:
        ConfigError: the folder holds no run.
    """
    return Run(folder)


def _sampling(folder: Path, settings: Mapping[str, Any]) -> TalkConfig:
    defaults = composed_defaults("generate") | {"run_dir": str(folder), "stream": False}
    keys = TalkConfig.SAMPLING
    if unknown := [
        f"{key}={settings[key]!r}: unknown setting{suggest(key, keys)}" for key in settings if key not in keys
    ]:
        raise ConfigError("\n".join(unknown))
    return check_talk(defaults | dict(settings))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:_}" if isinstance(value, int) else str("–" if value is None else value)
