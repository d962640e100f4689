"""Translates settings for DeepSpeed's engine, and refuses unsupported ones."""

import importlib.util
from collections.abc import Mapping
from typing import Any

from torch import nn

from llm.errors import ConfigError

STAGES = (0, 1, 2, 3)
NEVER = 10**12


def engine_config(
    *,
    stage: int,
    offload_optimizer: bool,
    offload_parameters: bool,
    bucket_elements: int,
    persistence_threshold: int,
) -> dict[str, Any]:
    """Return the engine's configuration; accumulation and precision are added when the trainer is known."""
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero |= {
            "contiguous_gradients": True,
            "overlap_comm": True,
            "reduce_scatter": True,
            "allgather_partitions": True,
            "reduce_bucket_size": bucket_elements,
            "allgather_bucket_size": bucket_elements,
            "sub_group_size": NEVER,
        }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket_elements,
            "stage3_param_persistence_threshold": persistence_threshold,
        }
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": 1,  # only its throughput log reads it
        "gradient_clipping": 0.0,  # the module clips; without this key the engine would clip at 1
        "steps_per_print": NEVER,
    }


def precision_config(precision: str) -> dict[str, Any]:
    """Return the engine's settings of precision. Mixed precision is autocast around fp32 weights."""
    if precision == "bf16-mixed":  # gradients are reduced in fp32, as without DeepSpeed
        return {"torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}}
    if precision == "bf16-true":
        return {
            "bf16": {"enabled": True, "check_grad_overflow": False},
            "data_types": {"grad_accum_dtype": "fp32"},
        }
    return {}


def require_deepspeed() -> None:
    """Raise ConfigError where DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "trainer=deepspeed: the package deepspeed is not installed; pip install deepspeed==0.19.8, or use "
            "trainer=ddp"
        )


def check_settings(trainer: Mapping[str, Any], *, precision: str, compiled: bool) -> None:
    """Refuse settings that ZeRO does not support, before anything is built.

    Args:
        trainer: the trainer's node.
        precision: the resolved precision.
        compiled: whether the model is compiled.

    Raises:
        ConfigError: a setting is unsupported, with one line per problem, or DeepSpeed is not installed.
    """
    require_deepspeed()
    stage, problems = trainer["stage"], []
    if stage not in STAGES:
        raise ConfigError(f"trainer.stage={stage}: must be one of 0, 1, 2, 3; 2 is usual")
    if precision == "bf16-true" and stage < 2:
        problems.append(
            f"trainer.precision=bf16-true: at trainer.stage={stage} the engine holds no fp32 gradients (and at stage 0 "
            "takes a step of its own at the start); use trainer.stage=2 or 3, or trainer.precision=bf16-mixed"
        )
    if precision == "64-true":
        problems.append("trainer.precision=64-true: the engine has no fp64; use 32-true, or trainer=ddp")
    if trainer["offload_parameters"] and stage != 3:
        problems.append(f"trainer.offload_parameters=true: at trainer.stage={stage} weights stay; use trainer.stage=3")
    if trainer["offload_optimizer"] and stage == 0:
        problems.append("trainer.offload_optimizer=true: stage 0 keeps all on the device; use trainer.stage=1, 2 or 3")
    if compiled and stage == 3:
        problems.append("compile=true: stage 3 fetches weights in hooks that a compiled model lacks; set compile=false")
    for key, least in (("bucket_elements", 2), ("persistence_threshold", 0), ("timeout_seconds", 1)):
        if trainer[key] < least:
            problems.append(f"trainer.{key}={trainer[key]}: must be at least {least}; see conf/trainer/deepspeed.yaml")
    if problems:
        raise ConfigError("\n".join(problems))


def check_trainable(model: nn.Module, names: Mapping[int, str], *, stage: int) -> None:
    """Raise ConfigError for a parameter that stage 3 would shard although no optimizer group has it."""
    left = [name for name, parameter in model.named_parameters() if id(parameter) not in names]
    if stage == 3 and left:
        raise ConfigError(
            f"trainer.stage=3: {left[0]} is not trained, and stage 3 shards trained parameters alone; use "
            "trainer.stage=2"
        )
