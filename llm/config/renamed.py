"""Maps names in the config.yaml of older versions to the present ones, so that they still load."""

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "data.module.": "data.data_module.",
    "llm.attention.": "llm.model.attention.",
    "llm.ffn.": "llm.model.ffn.",
    "llm.init.": "llm.model.init.",
    "llm.norm.": "llm.model.norm.",
    "llm.position.": "llm.model.position.",
    "llm.schedule.": "llm.scaling.schedule.",
    "llm.spikes.": "llm.training.spikes.",
    "llm.strategy.": "llm.distributed.strategy.",
    "llm.transformer.": "llm.model.transformer.",
}
"""Former prefix of a `_target_` -> present prefix; version 0.1 wrote the former ones."""

RENAMED_PIECES = {
    "llm.distributed.strategy.deepspeed_trainer": "llm.distributed.deepspeed_trainer.deepspeed_trainer",
    "llm.evals.attention.Attention": "llm.evals.attention_entropy.AttentionEntropy",
    "llm.evals.codebook.Codebook": "llm.evals.codebook_usage.CodebookUsage",
    "llm.evals.experts.Experts": "llm.evals.expert_usage.ExpertUsage",
    "llm.evals.loss.Loss": "llm.evals.held_out_loss.HeldOutLoss",
    "llm.evals.samples.Samples": "llm.evals.sampled_text.SampledText",
    "llm.model.ffn.balance.base.Balance": "llm.model.ffn.balance.balance_rule.Balance",
    "llm.scaling.batch_schedule.constant": "llm.scaling.batch_schedule.constant_batch",
}
"""Former `_target_` -> present one, after its prefix is renamed."""

LOGGERS = {
    "llm.callbacks.file_loggers.csv_logger": "csv",
    "llm.callbacks.file_loggers.tensorboard_logger": "tensorboard",
    "llm.callbacks.wandb_logger.WandbRunLogger": "wandb",
}
"""`_target_` of a logger -> its name in `logger`."""


ADDED_SETTINGS = {
    "llm.optim.muon.Muon": {"hyperball": False},
    "llm.scaling.rules.adam_eps": {"momentum": None},
    "llm.scaling.rules.sign": {"momentum": None},
    "llm.scaling.rules.variance": {"momentum": None},
    "llm.optim.tiger.Tiger": {"min_rms_ratio": 0.0},
}
"""`_target_` -> settings that version 0.1 did not have, with the values at which nothing changes."""


def present_target(target: str) -> str:
    """Return the present name of a `_target_`."""
    for former, present in RENAMED.items():
        if target.startswith(former):
            target = present + target.removeprefix(former)
            break
    return RENAMED_PIECES.get(target, target)


def with_named_loggers(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration in which `logger` maps names to nodes; version 0.1 had a single node there."""
    node = cfg.get("logger")
    if not isinstance(node, Mapping) or "_target_" not in node:
        return dict(cfg)
    return {**cfg, "logger": {LOGGERS.get(str(node["_target_"]), "logger"): node}}


def with_present_targets(node: Any) -> Any:
    """Return a plain configuration with every `_target_` under its present name, and with settings added since."""
    if isinstance(node, Mapping):
        renamed = {
            key: present_target(value) if key == "_target_" and isinstance(value, str) else with_present_targets(value)
            for key, value in node.items()
        }
        return ADDED_SETTINGS.get(str(renamed.get("_target_")), {}) | renamed
    return [with_present_targets(value) for value in node] if isinstance(node, list) else node
