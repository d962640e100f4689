"""What DeepSpeed's engine is told, and which settings cannot be honoured."""

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
        "gradient_clipping": 0.0,  # the module clips; left out, the engine would clip at 1
        "steps_per_print": NEVER,
    }


def precision_config(precision: str) -> dict[str, Any]:
    """Return what the engine is told of the precision; mixed precision is autocast around fp32 weights."""
    if precision == "bf16-mixed":  # gradients are reduced in fp32, as those of fp32 weights are elsewhere
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


def check_trainable(model: nn.Module, names: Mapping[int, str], *, stage: int) -> None:
    """Raise ConfigError for a parameter that stage 3 would cut up though no optimizer group has it."""
    left = [name for name, parameter in model.named_parameters() if id(parameter) not in names]
    if stage == 3 and left:
        raise ConfigError(
            f"trainer.stage=3: {left[0]} is not trained, and stage 3 shards trained parameters alone; use "
            "trainer.stage=2"
        )
