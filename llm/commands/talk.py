"""Continues prompts with a trained model: `python -m llm.generate run_dir=runs/<folder> prompt="def "`."""

import math
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from llm.commands.cli import run_plain_command
from llm.config.settings import settings
from llm.errors import ConfigError
from llm.generate.sampling import check_sampling
from llm.generate.text import Continuation, encode_prompts
from llm.ops.memory import peak_memory_bytes
from llm.tables import format_bytes
from llm.training.rebuild import TrainedModel, rebuild_model


@dataclass(frozen=True, kw_only=True)
class TalkConfig:
    """The keys of conf/generate.yaml."""

    SAMPLING: ClassVar = (
        "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "stop", "seed", "use_cache", "steps"
    )  # fmt: skip

    run_dir: str
    checkpoint: str
    average: int
    prompt: str | list[str] | None
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    repetition_penalty: float
    stop: list[str]
    seed: int
    use_cache: bool
    steps: int | None = None
    stream: bool
    model: dict[str, Any] | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings that `llm.generate` takes."""
        return {key: getattr(self, key) for key in self.SAMPLING}


def check_talk(cfg: Mapping[str, Any]) -> TalkConfig:
    """Return the settings, or raise ConfigError with every mistake in them."""
    config = settings(TalkConfig, cfg)
    keys = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "steps")
    check_sampling(**{key: config.sampling[key] for key in keys})
    return config


def talk(cfg: dict[str, Any]) -> None:
    """Continue the prompts, or start a dialogue where there is none."""
    config = check_talk(cfg)
    position = (config.model or {}).get("position")
    trained = rebuild_model(
        Path(config.run_dir),
        config.checkpoint,
        average=config.average,
        position=position,
    )
    if config.prompt is None:
        converse(trained, config)
        return
    prompts = [config.prompt] if isinstance(config.prompt, str) else config.prompt
    check_lengths(trained, prompts, config.max_new_tokens)
    speak(trained, prompts, config)


def check_lengths(trained: TrainedModel, prompts: list[str], max_new_tokens: int) -> None:
    """Raise ConfigError for a text that would become longer than the position supports.

    Raises:
        ConfigError: the prompt, or prompt and continuation together, are too long.
    """
    length = trained.config.run.context_length
    reach = trained.model.reach(length)
    longest = max(len(ids) for ids in encode_prompts(prompts, trained.tokenizer))
    remedy = "read with model/position=rerope"
    name = type(trained.model.position).__name__
    kind = f"model/position={name} of a model trained on windows of {length} reads {reach:.0f}"
    if longest > reach:
        raise ConfigError(f"prompt=…: {longest} tokens, and {kind}; shorten it, or {remedy}")
    if longest + max_new_tokens - 1 > reach:  # the last token drawn is never read
        room = math.floor(reach) - longest + 1
        raise ConfigError(
            f"max_new_tokens={max_new_tokens}: too many after the {longest} tokens of the prompt: {kind}; "
            f"lower it to {room}, or {remedy}"
        )


def half_precision(trained: TrainedModel) -> AbstractContextManager[Any]:
    """Return the context that multiplies in the precision of training."""
    return torch.autocast(trained.device.type, dtype=torch.bfloat16, enabled=trained.precision == "bf16-mixed")


def speak(trained: TrainedModel, prompts: list[str], config: TalkConfig) -> None:
    """Continue prompts together and print the texts, a single one as it grows; then print speed and memory."""
    continuation = Continuation(
        trained.model, prompts, tokenizer=trained.tokenizer, decode=trained.objective.decode, **config.sampling
    )
    is_shown = config.stream and len(prompts) == 1
    sys.stdout.write(prompts[0] if is_shown else "")
    with half_precision(trained):
        for texts in continuation:
            if is_shown:
                sys.stdout.write(texts[0].news())
                sys.stdout.flush()
    done = continuation.result()
    rule = "-" * 60
    sys.stdout.write("\n" if is_shown else f"\n{rule}\n".join(done.texts) + "\n")
    rate = done.decode_steps * len(prompts) / max(done.decode_seconds, 1e-9)
    sys.stderr.write(
        f"{done.num_tokens} tokens: the first after {done.prefill_seconds * 1e3:.0f} ms, then {rate:.1f} tokens/s; "
        f"cache {format_bytes(done.cache_bytes)}, peak memory {format_bytes(peak_memory_bytes(trained.device))}\n"
    )


def converse(trained: TrainedModel, config: TalkConfig) -> None:
    """Continue one line after another until the input ends."""
    sys.stderr.write("enter a text to continue; write \\n for a line break, and Ctrl-D to quit\n")
    while True:
        sys.stderr.write("> ")
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        prompt = line.rstrip("\n").replace("\\n", "\n")
        try:
            check_lengths(trained, [prompt], config.max_new_tokens)
        except ConfigError as error:
            sys.stderr.write(f"{error}\n")
            continue
        speak(trained, [prompt], config)


def main() -> None:
    """Run the generation that the command line describes."""
    run_plain_command(talk, config_name="generate", raw=frozenset({"prompt"}))
