"""Prints the settings of a run before it starts, and its result."""

import logging
from typing import Any

from llm.config.checked import CheckedConfig
from llm.distributed.parameters import count_parameters
from llm.run_folder.folder import RunFolder
from llm.scaling.derivation import rule_and_settings, rule_of_factory
from llm.scaling.suitability import mismatch
from llm.training.module import LanguageModule

log = logging.getLogger(__name__)


def announce(checked: CheckedConfig, folder: RunFolder, module: LanguageModule, data: Any) -> None:
    """Print the run folder, the model, the data, the batch and the learning rate."""
    plan, steps = checked.sizes.plan, checked.sizes.total_steps
    tokens, parameters = module.tokens_seen(steps), count_parameters(module.model)[0]
    name, vocabulary = checked.run.name, data.tokenizer.vocab_size
    log.info("run folder   %s", folder.path)
    log.info("model        %s, %s parameters, vocabulary %s", name, f"{parameters:_}", vocabulary)
    log.info("data         %s train tokens, %s validation tokens", f"{data.train_tokens:_}", f"{data.val_tokens:_}")
    log.info(
        "batch        %s tokens = accumulation %d x devices %d x %d windows of %d",
        *(f"{plan.batch_tokens:_}", plan.accumulation, plan.world_size, plan.micro_batch_size, plan.context_length),
    )
    log.info("steps        %s, %s tokens, %.2f epochs", f"{steps:_}", f"{tokens:_}", tokens / data.train_tokens)
    if data.has_own_validation_set and data.val_tokens > data.max_val_tokens:
        log.warning(
            "loader.val_tokens=%d: each validation of the run reads so many of the set's %s tokens; eval.py reads all",
            *(data.max_val_tokens, f"{data.val_tokens:_}"),
        )
    for line in module.lr_derivation:
        log.info(line)
    for line in module.model.cautions(context_length=plan.context_length, is_training=True):
        log.warning(line)
    optimizer, _ = rule_of_factory(module.build_optimizer)
    warning = mismatch(rule_and_settings(module.scaling)[0], optimizer)
    if warning and any("->" in line for line in module.lr_derivation):
        log.warning(warning)


def announce_result(folder: RunFolder) -> None:
    """Print the final validation figures and the run folder."""
    summary = folder.read_summary()
    sign = "<= " if summary.get("bound") else ""
    if summary.get("val/loss") is None:
        log.info("val/loss     not measured: no validation batch was read, or the loss is not finite")
    else:
        log.info("val/loss     %s%.4f nats per token", sign, summary["val/loss"])
    if summary.get("bits_per_byte") is not None:
        log.info("             %s%.4f bits per byte", sign, summary["bits_per_byte"])
    log.info("run folder   %s", folder.path)
