"""Exports a run as a Hugging Face folder: `python -m llm.export run_dir=runs/<folder> format=hf out=<new folder>`."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llm.adapt.lora import merge_additions
from llm.commands.cli import run_plain_command
from llm.contracts import CAUSAL
from llm.errors import CheckpointError, ConfigError
from llm.huggingface.families import find_family
from llm.huggingface.hf_folder import discard, replace_folder, write_folder
from llm.huggingface.logits import TOLERANCE, compare_logits, has_transformers, random_windows
from llm.huggingface.names import to_theirs
from llm.training.rebuild import TrainedModel, rebuild_model

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
    """Write a run's weights, configuration and tokenizer as a folder that `transformers` loads, and compare its logits.

    The folder gets its final name only after its logits have been compared with the run's.

    Raises:
        ConfigError: the format cannot express this decoder, `out` is not empty, or `transformers` is missing.
        CheckpointError: the weights cannot be loaded, or logits differ by more than 1e-4.
    """
    out = Path(config.out).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={config.out}: exists and is not empty; choose a new folder")
    require_transformers()
    trained = rebuild_model(Path(config.run_dir), config.checkpoint, average=config.average, device="cpu")
    if trained.objective.sight != CAUSAL:
        raise ConfigError(
            f"objective={trained.objective.name}: every class of transformers that is written here is causal, and none "
            "computes this decoder; export a run of objective=next_token"
        )
    model = trained.model.float()
    merge_additions(model)
    round_weights(model, DTYPES[config.dtype])
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        architecture = write_model(trained, temporary, dtype=DTYPES[config.dtype])
        ids = random_windows(
            tokens=config.tokens,
            context_length=trained.config.run.context_length,
            vocab_size=model.vocab_size,
            bos_id=trained.tokenizer.bos_id,
        )
        difference = compare_logits(model, temporary, ids)
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
    """Raise ConfigError where `transformers`, with which an export is compared, is not installed."""
    if not has_transformers():
        raise ConfigError("transformers: not installed, and exports are verified with it; pip install '.[eval]'")


def round_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round every parameter to `dtype` and keep it in fp32, so that the comparison is with the weights as written."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))


def write_model(trained: TrainedModel, folder: Path, *, dtype: torch.dtype) -> str:
    """Write the folder, and return the name of the Hugging Face class that loads it."""
    context_length, tokenizer = trained.config.run.context_length, trained.tokenizer
    family = find_family(trained.model, context_length=context_length, bos_id=tokenizer.bos_id)
    weights = to_theirs(trained.model.state_dict(), family.model_type)
    name = str(dtype).removeprefix("torch.")
    config = family.config | {"dtype": name, "torch_dtype": name}
    weights = {key: tensor.to(dtype) if _is_rounded(key, tensor) else tensor for key, tensor in weights.items()}
    write_folder(folder, config=config, weights=weights, tokenizer=tokenizer, context_length=context_length)
    return config["architectures"][0]


def _is_rounded(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not name.endswith("e_score_correction_bias")


def check_export(cfg: Mapping[str, Any]) -> ExportConfig:
    """Return the settings, or raise ConfigError with every mistake in them."""
    from llm.config.settings import settings

    return settings(ExportConfig, cfg)


def main() -> None:
    """Run the export that the command line describes."""
    run_plain_command(lambda cfg: export(check_export(cfg)), config_name="export")
