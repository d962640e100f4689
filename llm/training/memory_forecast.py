"""Forecasts the peak memory of a run on one device."""

import sys

import psutil
from torch import nn

from llm.config.sizes import Sizes
from llm.model.transformer import Transformer
from llm.tables import format_bytes, format_table

TRAINING_LIBRARIES = 205 << 20
"""Bytes of the libraries that a plan does not import and training does, mostly Lightning and torch's compiler; as
measured with lightning 2.6."""
KEPT_OF_PASSING = 0.3
"""Share of the activations' memory that glibc holds in blocks too small to be reused. It falls with the size of the
blocks: 0.45 to 1 was measured at model/size=small, and none at 124m."""
KEPT_OF_CHECKPOINT = 0.35
"""Share of a checkpoint's copy of weights and state that finds no freed block; 0 to 0.8 was measured."""


KEPT_OF_EXPERTS = 0.65
"""Further share of such a copy of stacks of experts, which are larger than most freed blocks; measured at small."""


def memory_table(model: Transformer, sizes: Sizes, *, state: int, activations: int, logits: int, process: int) -> str:
    """Return the parts of the peak memory as a table; on a CPU with the process itself.

    Args:
        model: the decoder, with or without storage.
        sizes: sizes of the run.
        state: bytes of optimizer state.
        activations: bytes that autograd keeps for one micro-batch.
        logits: bytes of the largest chunk of logits.
        process: bytes of the process before it trains; see `process_bytes`.
    """
    plan = sizes.plan
    parts = {
        **held_bytes(model, sizes, state=state),
        f"activations ({plan.micro_batch_size} x {plan.context_length} tokens)": activations,
        "logits (largest chunk)": logits,
    }
    if sizes.accelerator == "cpu":
        parts |= _parts_on_cpu(model, sizes, state=state, passing=activations + logits, process=process)
    rows = [[name, format_bytes(value)] for name, value in parts.items()]
    return format_table(["part", "bytes"], [*rows, ["all", format_bytes(sum(parts.values()))]])


def process_bytes() -> int:
    """Return the bytes of the interpreter and its libraries: what this process has, and what training will import."""
    is_loaded = "lightning" in sys.modules
    return psutil.Process().memory_info().rss + (0 if is_loaded else TRAINING_LIBRARIES)


def held_bytes(model: nn.Module, sizes: Sizes, *, state: int) -> dict[str, int]:
    """Return the bytes that stay allocated between updates."""
    size, parameters = 2 if sizes.precision == "bf16-true" else 4, sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"weights": parameters * size, "gradients": trained * size, "optimizer state": state}


def _parts_on_cpu(model: Transformer, sizes: Sizes, *, state: int, passing: int, process: int) -> dict[str, int]:
    """Return the further parts of a CPU's memory.

    Mixed precision copies the weights to bf16 again for a validation. The allocator keeps freed blocks and reuses a
    part of them.
    """
    parameters = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for p in model.parameters() if p.ndim == 3)
    checkpoint = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad) + state
    kept = KEPT_OF_PASSING * passing + (KEPT_OF_CHECKPOINT + KEPT_OF_EXPERTS * experts / parameters) * checkpoint
    return {
        "bf16 copies for validation": 2 * parameters if sizes.precision == "bf16-mixed" else 0,
        "freed blocks, checkpoint copy (measured)": int(kept),
        "this process (Python and its libraries)": process,
    }
