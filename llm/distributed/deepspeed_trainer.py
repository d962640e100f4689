"""Builds Lightning's Trainer around the DeepSpeed strategy, for `trainer=deepspeed`."""

import inspect
import os
from typing import Any

import lightning as L
import torch

from llm.distributed.strategy import ZeroStrategy
from llm.distributed.zero.engine_settings import check_settings


def deepspeed_trainer(
    *,
    stage: int,
    offload_optimizer: bool,
    offload_parameters: bool,
    bucket_elements: int,
    persistence_threshold: int,
    timeout_seconds: float,
    **trainer: Any,
) -> L.Trainer:
    """Build Lightning's Trainer around a `ZeroStrategy`; other arguments are the Trainer's own.

    Args:
        stage: stage of ZeRO, 0 to 3; see `ZeroStrategy` for this and the next five.
        offload_optimizer: whether the state and the fp32 masters are stored in the host's memory.
        offload_parameters: whether the weights of stage 3 are stored there too.
        bucket_elements: elements that are reduced or gathered at a time, at least 1.
        persistence_threshold: number of elements below which stage 3 stores a parameter whole on every rank.
        timeout_seconds: seconds after which a rank stops waiting for another, > 0.
        trainer: arguments of `lightning.Trainer`.
    """
    if trainer.get("accelerator") == "cpu" or not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it once, at its first import
    strategy = ZeroStrategy(
        stage=stage,
        offload_optimizer=offload_optimizer,
        offload_parameters=offload_parameters,
        bucket_elements=bucket_elements,
        persistence_threshold=persistence_threshold,
        timeout_seconds=timeout_seconds,
    )
    return L.Trainer(strategy=strategy, **trainer)


def _signature() -> inspect.Signature:
    """Return the arguments of the strategy and the trainer, so that a misspelt one is refused early."""
    own = [p for p in inspect.signature(deepspeed_trainer).parameters.values() if p.kind is p.KEYWORD_ONLY]
    names = {p.name for p in own} | {"self", "strategy"}
    lightning = [p for p in inspect.signature(L.Trainer).parameters.values() if p.name not in names]
    return inspect.Signature([*own, *lightning])


deepspeed_trainer.check_settings = check_settings  # pyright: ignore[reportFunctionMemberAccess]
deepspeed_trainer.__signature__ = _signature()  # pyright: ignore[reportFunctionMemberAccess]
