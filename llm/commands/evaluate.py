"""Evaluates trained runs from their folders, for eval.py."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm.config.pieces import instantiate
from llm.config.safety import secrets_in
from llm.config.settings import settings
from llm.config.signatures import check_node, target_nodes
from llm.errors import ConfigError
from llm.evals.evaluation import Evaluation, Result, Subject, save_plot
from llm.evals.other_text import open_source, source_patterns
from llm.run_folder.checkpoint_files import MANIFEST
from llm.tables import format_table
from llm.training.rebuild import TrainedRun, rebuild

DTYPES = {"bf16-true": torch.bfloat16, "64-true": torch.float64}

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The keys of conf/eval.yaml."""

    run_dir: str | list[str] | None
    checkpoint: str
    average: int
    eval: dict[str, Any] | None = None
    """Evaluations by name, each a node with its settings."""
    context_length: int | None = None
    model: dict[str, Any] | None = None
    """`position`: the node of another position to evaluate with; positions have no weights."""


def evaluate(config: EvalConfig | Mapping[str, Any], path: Path) -> float | None:
    """Evaluate each run, print tables, and write `<name>.json` and `<name>.png`.

    Results of one run are written to `path`; those of several into `eval/` in each run folder, and their comparison to
    `path`.

    Returns:
        The validation loss of the first run, if it was measured.

    Raises:
        ConfigError: an unknown key or evaluation, or a folder without a run.
        CheckpointError: weights that are missing, corrupt, or of another architecture.
    """
    if not isinstance(config, EvalConfig):
        config = check_eval(config)
    evaluations: dict[str, Evaluation] = instantiate(config.eval)
    runs = run_folders(config)
    results: dict[str, dict[str, Result]] = {}
    for folder, checkpoint in runs:
        subject = load_subject(config, folder, checkpoint)
        out = path if len(runs) == 1 else folder / "eval"
        results[str(folder)] = judge(subject, evaluations, out)
    if len(runs) > 1:
        write_comparison({name: _headlines(found) for name, found in results.items()}, path)
    first = next(iter(results.values()))
    return first["loss"].figures["val/loss"] if "loss" in first else None


def check_eval(cfg: Mapping[str, Any]) -> EvalConfig:
    """Return the evaluation's settings, or raise ConfigError with every mistake in them."""
    config = settings(EvalConfig, cfg)
    nodes = target_nodes(config.eval, "eval")
    problems = [*secrets_in(cfg), *(problem for path, node in nodes for problem in check_node(path, node))]
    if problems:
        raise ConfigError("\n".join(problems))
    if not config.eval:
        raise ConfigError("eval=[]: nothing to do; choose from those that --help lists, as in 'eval=[loss,samples]'")
    instantiate(config.eval)
    for folder, _ in run_folders(config):
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"run_dir={folder}: holds no config.yaml; name a run folder, such as runs/<folder>")
    return config


def run_folders(config: EvalConfig) -> list[tuple[Path, str]]:
    """Return each run folder with the name of its checkpoint.

    Raises:
        ConfigError: neither a run folder nor a checkpoint's own folder.
    """
    given = [config.run_dir] if isinstance(config.run_dir, str) else config.run_dir or []
    if given:
        return [(Path(folder), config.checkpoint) for folder in given]
    path = Path(config.checkpoint).resolve()
    if not (path / MANIFEST).is_file():
        raise ConfigError(
            f"run_dir=null checkpoint={config.checkpoint}: neither names a run; give run_dir=runs/<folder>, or "
            "checkpoint=runs/<folder>/checkpoints/<name>"
        )
    return [(path.parent.parent, path.name)]


def load_subject(config: EvalConfig, folder: Path, checkpoint: str) -> Subject:
    """Rebuild a run for its evaluation."""
    run = rebuild(
        folder,
        checkpoint,
        average=config.average,
        position=(config.model or {}).get("position"),
        context_length=config.context_length,
    )
    for line in run.module.model.cautions(context_length=run.config.run.context_length, is_training=False):
        log.warning(line)
    return subject_of(run)


def subject_of(run: TrainedRun) -> Subject:
    """Return the subject of evaluations for a rebuilt run."""
    model = run.module.model.to(run.device).eval()
    if run.precision in DTYPES:
        model = model.to(DTYPES[run.precision])
    return Subject(
        name=run.folder.name,
        model=model,
        objective=run.module.objective,
        data=run.data,
        precision=run.precision,
        context_length=run.config.run.context_length,
        open_source=partial(open_source, run.config, run.folder),
        source_files=source_patterns(run.config.tree),
    )


def judge(subject: Subject, evaluations: Mapping[str, Evaluation], out: Path) -> dict[str, Result]:
    """Run evaluations one after another; print and write each result at once."""
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, evaluation in evaluations.items():
        result = results[name] = evaluation(subject)
        title = f"{subject.name}: {name}"
        log.info("%s\n%s", title, "\n".join(part for part in (table_of(result), result.text) if part))
        text = json.dumps(result.figures, indent=2, ensure_ascii=False)
        (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        save_plot(result, out / f"{name}.png")
    return results


def table_of(result: Result) -> str:
    """Return a result's table as text."""
    return format_table(result.header, result.rows) if result.header else ""


def _headlines(results: Mapping[str, Result]) -> dict[str, float]:
    return {name: value for result in results.values() for name, value in result.headline.items()}


def write_comparison(headlines: Mapping[str, Mapping[str, float]], out: Path) -> None:
    """Print and write one table of several runs."""
    columns = list(dict.fromkeys(name for headline in headlines.values() for name in headline))
    rows = [
        [name, *(f"{headline[column]:.4f}" if column in headline else "-" for column in columns)]
        for name, headline in headlines.items()
    ]
    log.info("%s", format_table(["run", *columns], rows))
    out.mkdir(parents=True, exist_ok=True)
    (out / "comparison.json").write_text(json.dumps(headlines, indent=2) + "\n", encoding="utf-8")
