"""A trained run as a Hugging Face folder: `python -m llm.export run_dir=runs/<folder> format=hf out=<new folder>`."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llm.commands.cli import run_plain_command
from llm.errors import CheckpointError, ConfigError
from llm.huggingface.families import find_family
from llm.huggingface.folder import discard, replace_folder, write_folder
from llm.huggingface.names import to_theirs
from llm.training.rebuild import TrainedModel, rebuild_model

TOLERANCE = 1e-4
"""Largest difference of logits, in fp32, up to which an export is the same model."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The keys of conf/export.yaml."""

    run_dir: str
    checkpoint: str
    average: int
    format: Literal["hf"]
    out: str
    dtype: Literal["float32", "bfloat16"]
    tokens: int


def export(config: ExportConfig) -> Path:
    """Write a run's weights, configuration and tokenizer as a folder that `transformers` loads, and prove it equal.

    The folder appears under its name only after its logits were compared with ours.

    Raises:
        ConfigError: a format that cannot hold this decoder, a folder that is not empty, or `transformers` missing.
        CheckpointError: weights that cannot be loaded, or logits that differ by more than 1e-4.
    """
    out = Path(config.out).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={config.out}: is there already and not empty; choose a new folder")
    require_transformers()
    trained = rebuild_model(Path(config.run_dir), config.checkpoint, average=config.average, device="cpu")
    model = trained.model.float()
    round_weights(model, DTYPES[config.dtype])
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        architecture = write_model(trained, temporary, dtype=DTYPES[config.dtype])
        ids = sample_ids(trained, config.tokens)
        difference = compare_logits(trained, temporary, ids)
        log.info("compared     %d tokens, largest difference of logits %.2e", ids.numel(), difference)
        if difference > TOLERANCE:
            raise CheckpointError(
                f"out={config.out}: logits differ by {difference:.2e}, more than {TOLERANCE:g}; nothing was written"
            )
        replace_folder(temporary, out)
    finally:
        discard(temporary)
    log.info("exported     %s to %s", architecture, out)
    return out


def require_transformers() -> None:
    """Raise ConfigError where `transformers`, which proves an export, is not installed."""
    try:
        import transformers  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            "transformers: not installed, and an export is proved with it; pip install '.[eval]'"
        ) from error


def round_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round every parameter to `dtype`, kept in fp32: what will be compared is what will be written."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))


def write_model(trained: TrainedModel, folder: Path, *, dtype: torch.dtype) -> str:
    """Write the folder in one of the formats; return the name of the class that it will load as."""
    context_length, tokenizer = trained.config["context_length"], trained.tokenizer
    family = find_family(trained.model, context_length=context_length, bos_id=tokenizer.bos_id)
    weights = to_theirs(trained.model.state_dict(), family.model_type)
    name = str(dtype).removeprefix("torch.")
    config = family.config | {"dtype": name, "torch_dtype": name}
    weights = {key: tensor.to(dtype) if _is_rounded(key, tensor) else tensor for key, tensor in weights.items()}
    write_folder(folder, config=config, weights=weights, tokenizer=tokenizer, context_length=context_length, code={})
    return config["architectures"][0]


def _is_rounded(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not name.endswith("e_score_correction_bias")


def sample_ids(trained: TrainedModel, tokens: int) -> Tensor:
    """Return windows of random ids, about as many as asked for, each beginning a document."""
    length = trained.config["context_length"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(trained.model.vocab_size, (max(1, tokens // length), length), generator=generator)
    ids[:, 0] = trained.tokenizer.bos_id
    return ids


@torch.no_grad()
def compare_logits(trained: TrainedModel, folder: Path, ids: Tensor) -> float:
    """Return the largest difference between our logits and those of the folder as `transformers` loads it, in fp32."""
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]
    from transformers.utils import logging as their_logging  # pyright: ignore[reportMissingImports]

    their_logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    worst = 0.0
    for row, places in zip(ids.split(1), positions.split(1), strict=True):
        ours = trained.model.logits(trained.model(row, positions=places).hidden)
        worst = max(worst, float((theirs(input_ids=row).logits - ours).abs().max()))
    return worst


def check_export(cfg: Mapping[str, Any]) -> ExportConfig:
    """Return the settings, or raise ConfigError with every mistake in them."""
    from llm.config.settings import settings

    return settings(ExportConfig, cfg)


def main() -> None:
    """Export what the command line names."""
    run_plain_command(lambda cfg: export(check_export(cfg)), config_name="export")
