"""Computes the plan of a run for `plan=true`: parameters, memory, FLOPs, steps and time, without training."""

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from llm.adapt.work import training_factor
from llm.config.build import (
    adapted,
    build_averaging,
    build_meta_model,
    build_model,
    build_objective,
    build_tokenizer,
    module_factories,
)
from llm.config.checked import CheckedConfig
from llm.config.sizes import Sizes
from llm.distributed.parameters import own_parameters
from llm.distributed.zero.engine_settings import STAGES
from llm.distributed.zero.rank_memory import bytes_per_rank
from llm.ops.flops import peak_flops
from llm.ops.loss import chunk_scores
from llm.ops.memory import SavedBytes, optimizer_state_bytes
from llm.optim.receipt import receipt
from llm.scaling.derivation import brief, derivation
from llm.tables import format_bytes, format_count, format_seconds, format_table
from llm.training.learning_rate import rated_groups
from llm.training.memory_forecast import memory_table, process_bytes
from llm.training.trial import NO_TOKEN, trial_batch, trial_loss

EXAMPLE_DEVICES = 8
"""Devices that memory by stage is shown for where the run has one."""

DEVICE_GIGABYTES = (8, 16, 24, 40, 48, 80, 141, 192)
QUICK_PASS = 1 << 34
"""Multiplications of a forward pass up to which it runs for real, which takes less time than loading fake tensors."""
USABLE = 0.9
"""Share of a device's memory that a run can use; the driver, buffers and fragmentation take the rest."""

ASSUMED_MFU = 0.4
"""Share of the device's peak that the estimated time assumes; a finished run states its own."""


def describe_plan(checked: CheckedConfig) -> str:
    """Return the plan of a run as text."""
    tree, sizes = checked.tree, checked.sizes
    process = process_bytes()
    vocab_size = planned_vocabulary(tree)
    model = build_meta_model(tree, vocab_size)
    factories = module_factories(tree, sizes.ramp)
    groups = rated_groups(model, **{key: factories[key] for key in ("rates", "optimizer", "lr", "weight_decay")})
    state = sum(optimizer_state_bytes(groups, factories["optimizer"]).values())
    objective = build_objective(tree, vocab_size=vocab_size, bos_id=NO_TOKEN)
    length = checked.run.context_length
    flops = training_factor(model, length, objective.sight) * objective.flops_per_token(model, length)
    passing = activation_bytes(checked, vocab_size)
    memory = memory_table(model, sizes, state=state, activations=passing[0], logits=passing[1], process=process)
    unmeasured = sizes.needs_probe
    scale = 1.0 if unmeasured else max(factories["scaling"](batch_tokens) for _, _, batch_tokens in sizes.ramp.stages)
    sections = [
        f"Parameters (vocabulary {vocab_size:_})\n{_parameters(model)}",
        f"Memory on one {sizes.accelerator} device, {sizes.precision}\n{memory}",
        _memory_by_stage(model, sizes, state, sum(passing)),
        f"Work\n{_work(sizes, flops)}",
        "\n".join(["Learning rate", *_rates(sizes, factories), *_averages(checked)]),
        f"Optimizer receipt\n{receipt(factories['optimizer'](groups), lr_scale=scale, across_layers=True)}",
    ]
    return "\n\n".join(sections)


def planned_vocabulary(cfg: Mapping[str, Any]) -> int:
    """Return the vocabulary that the tokenizer's node asks for; a pretrained tokenizer is read."""
    if "vocab_size" in cfg["tokenizer"]:
        return int(cfg["tokenizer"]["vocab_size"])
    return int(build_tokenizer(cfg).vocab_size)


def parameters_by_part(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (total, active per token) of the embedding, each kind of sublayer, the norms and the head."""
    counts: dict[str, tuple[int, int]] = {}
    for name, numel, active in own_parameters(model):
        part = next((p for p in ("token_embedding", "lm_head", "norm", "attention", "ffn") if p in name), "other")
        total, used = counts.get(part, (0, 0))
        counts[part] = (total + numel, used + active)
    return counts


def _parameters(model: nn.Module) -> str:
    counts = parameters_by_part(model)
    rows = [[part, f"{total:_}", f"{active:_}"] for part, (total, active) in counts.items()]
    total, active = (sum(c[i] for c in counts.values()) for i in (0, 1))
    return format_table(["part", "parameters", "active per token"], [*rows, ["all", f"{total:_}", f"{active:_}"]])


def _memory_by_stage(model: nn.Module, sizes: Sizes, state: int, passing: int) -> str:
    """Return the memory of each device at each stage of `trainer=deepspeed`, and the smallest usual device for it."""
    ranks = sizes.world_size if sizes.world_size > 1 else EXAMPLE_DEVICES
    precision = sizes.precision
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - parameters
    rows = []
    for stage in STAGES:
        held = bytes_per_rank(parameters=parameters, state_bytes=state, stage=stage, ranks=ranks, precision=precision)
        held = held._replace(weights=held.weights + frozen * (2 if precision == "bf16-true" else 4))
        needed = held.total + passing
        fits = next((f"{size} GB" for size in DEVICE_GIGABYTES if needed <= size * 1e9 * USABLE), "none of these")
        rows.append([f"stage {stage}", *(format_bytes(int(part)) for part in (*held, needed)), fits])
    header = ["ZeRO", "weights", "gradients", "state, masters", "all, with activations", "smallest device"]
    return f"Memory on each of {ranks} devices, {precision}\n{format_table(header, rows)}"


def activation_bytes(checked: CheckedConfig, vocab_size: int) -> tuple[int, int]:
    """Return the bytes that autograd keeps in one micro-batch's forward pass, and those of the largest logits chunk."""
    plan = checked.sizes.plan
    tokens = plan.micro_batch_size * plan.context_length
    is_quick = tokens * sum(p.numel() for p in build_meta_model(checked.tree, vocab_size).parameters()) < QUICK_PASS
    with contextlib.nullcontext() if is_quick else without_data():
        model = adapted(checked.tree, build_model(checked.tree, vocab_size))
        objective = build_objective(checked.tree, vocab_size=vocab_size, bos_id=NO_TOKEN)
        batch = trial_batch(plan.micro_batch_size, plan.context_length, torch.device("cpu"))
        mixed = checked.sizes.precision.endswith("mixed")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed), SavedBytes(model) as saved:
            trial_loss(model, objective, batch)
        return saved.total, min(chunk_scores(checked.sizes.accelerator), batch["input_ids"].numel() * vocab_size) * 4


def without_data() -> AbstractContextManager[Any]:
    """Return the context in which tensors have shapes and no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # imports SymPy

    return FakeTensorMode(allow_non_fake_inputs=True)


def _rates(sizes: Sizes, factories: Mapping[str, Any]) -> list[str]:
    """Return one line per batch size of the run: how the rate follows from the batch."""
    lr, batches = factories["lr"], dict.fromkeys(size for _, _, size in sizes.ramp.stages)
    if sizes.needs_probe:
        return [f"  lr {brief(lr)} at the base batch; the rest follows from a noise scale that a probe measures first"]
    return [f"  {derivation(factories['scaling'], lr=lr, batch_tokens=size)}" for size in batches]


def _averages(checked: CheckedConfig) -> list[str]:
    """Return one line for the average of the weights: the decay of the rate that it stands for."""
    averages = build_averaging(checked.tree)
    return [f"  the average stands for {a.equivalent_decay(checked.sizes.total_steps)}" for a in averages]


def _work(sizes: Sizes, flops: float) -> str:
    plan, steps = sizes.plan, sizes.total_steps
    tokens = sizes.ramp.tokens_seen(steps)
    peak = peak_flops(torch.device(sizes.accelerator), bf16="16" in sizes.precision)
    rows = [
        ["updates", f"{steps:_}"],
        ["tokens per update", f"{plan.batch_tokens:_}"],
        [
            "windows per update",
            f"{plan.windows} = accumulation {plan.accumulation} x devices {plan.world_size} "
            f"x micro_batch_size {plan.micro_batch_size}",
        ],
        ["tokens", f"{tokens:_}"],
        ["training FLOPs per token", format_count(flops)],
        ["training FLOPs", format_count(flops * tokens)],
        ["device peak", "n/a: unknown device" if peak is None else f"{peak / 1e12:.2f} TFLOP/s"],
    ]
    if peak is not None:
        seconds = flops * tokens / (peak * plan.world_size * ASSUMED_MFU)
        rows.append(["time", f"{format_seconds(seconds)} at an assumed MFU of {ASSUMED_MFU:.0%}"])
    return format_table(["what", "value"], rows)
