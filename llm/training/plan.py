"""`plan=true`: what a run would take — parameters, memory, FLOPs, steps, time — without training anything."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llm.config.build import build_meta_model, build_model, build_tokenizer, module_factories
from llm.config.run import run_config
from llm.config.sizes import accelerator, batch_plan, batch_ramp, needs_probe
from llm.distributed.zero.memory import bytes_a_rank
from llm.distributed.zero.settings import STAGES
from llm.ops.flops import peak_flops
from llm.ops.loss import CHUNK_SCORES, linear_cross_entropy
from llm.ops.memory import SavedBytes, optimizer_state_bytes
from llm.ops.precision import resolve_precision
from llm.optim.receipt import receipt
from llm.scaling.batching import BatchPlan, BatchRamp
from llm.scaling.derivation import brief, derivation
from llm.tables import format_bytes, format_count, format_seconds, format_table
from llm.training.module import FORWARD_AND_BACKWARD, rated_groups

EXAMPLE_DEVICES = 8
"""Devices that memory by stage is shown for where the run has one."""

DEVICE_GIGABYTES = (8, 16, 24, 40, 48, 80, 141, 192)
USABLE = 0.9
"""Share of a device's memory that a run can count on; the rest goes to the driver, buffers and fragments."""

ASSUMED_MFU = 0.4
"""Share of the device's peak that the estimated time assumes; a finished run states its own."""


def describe_plan(cfg: Mapping[str, Any]) -> str:
    """Return the plan of a checked configuration as text."""
    run, plan = run_config(cfg), batch_plan(cfg)
    vocab_size = planned_vocabulary(cfg)
    model = build_meta_model(cfg, vocab_size)
    kind = accelerator(cfg["trainer"])
    precision = resolve_precision(cfg["trainer"]["precision"], accelerator=kind)
    factories = module_factories(cfg)
    groups = rated_groups(model, **{key: factories[key] for key in ("rates", "optimizer", "lr", "weight_decay")})
    state = optimizer_state_bytes(groups, factories["optimizer"])
    flops = FORWARD_AND_BACKWARD * model.flops_per_token(run.context_length)
    passing = activation_bytes(cfg, vocab_size, precision, plan.micro_batch_size, plan.context_length)
    sections = [
        f"Parameters (vocabulary {vocab_size:_})\n{_parameters(model)}",
        f"Memory on one {kind} device, {precision}\n{_memory(model, precision, sum(state.values()), plan, passing)}",
        _memory_by_stage(model, precision, sum(state.values()), plan, sum(passing)),
        f"Work\n{_work(batch_ramp(cfg), plan, flops, kind, 'bf16' in precision)}",
        "\n".join(["Learning rate", *_rates(cfg, factories)]),
        f"Optimizer receipt\n{receipt(factories['optimizer'](groups), across_layers=True)}",
    ]
    return "\n\n".join(sections)


def planned_vocabulary(cfg: Mapping[str, Any]) -> int:
    """Return the vocabulary that the tokenizer's node asks for; a pretrained tokenizer is read."""
    if "vocab_size" in cfg["tokenizer"]:
        return int(cfg["tokenizer"]["vocab_size"])
    return int(build_tokenizer(cfg).vocab_size)


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (total, active for one token) of the embedding, each kind of sublayer, norms and head.

    A module whose `active_fraction` is below 1 uses only that share of its parameters for a token.
    """
    counts: dict[str, tuple[int, int]] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        part = next((p for p in ("token_embedding", "lm_head", "norm", "attention", "ffn") if p in name), "other")
        owner = model.get_submodule(name.rpartition(".")[0])
        active = round(parameter.numel() * getattr(owner, "active_fraction", 1.0))
        total, used = counts.get(part, (0, 0))
        counts[part] = (total + parameter.numel(), used + active)
    return counts


def _parameters(model: nn.Module) -> str:
    counts = count_parameters(model)
    rows = [[part, f"{total:_}", f"{active:_}"] for part, (total, active) in counts.items()]
    total, active = (sum(c[i] for c in counts.values()) for i in (0, 1))
    return format_table(["part", "parameters", "active a token"], [*rows, ["all", f"{total:_}", f"{active:_}"]])


def _memory(model: nn.Module, precision: str, state: int, plan: BatchPlan, passing: tuple[int, int]) -> str:
    weights = sum(p.numel() for p in model.parameters())
    size = 2 if precision.endswith("-true") and "16" in precision else 4
    activations, logits = passing
    parts = {
        "weights": weights * size,
        "gradients": weights * size,
        "optimizer state": state,
        f"activations ({plan.micro_batch_size} x {plan.context_length} tokens)": activations,
        "logits (largest chunk)": logits,
    }
    rows = [[name, format_bytes(value)] for name, value in parts.items()]
    return format_table(["part", "bytes"], [*rows, ["all", format_bytes(sum(parts.values()))]])


def _memory_by_stage(model: nn.Module, precision: str, state: int, plan: BatchPlan, passing: int) -> str:
    """What each device would hold at each stage of `trainer=deepspeed`, and the smallest usual device for it."""
    ranks = plan.world_size if plan.world_size > 1 else EXAMPLE_DEVICES
    parameters = sum(p.numel() for p in model.parameters())
    rows = []
    for stage in STAGES:
        held = bytes_a_rank(parameters=parameters, state_bytes=state, stage=stage, ranks=ranks, precision=precision)
        needed = held.total + passing
        fits = next((f"{size} GB" for size in DEVICE_GIGABYTES if needed <= size * 1e9 * USABLE), "none of these")
        rows.append([f"stage {stage}", *(format_bytes(int(part)) for part in (*held, needed)), fits])
    header = ["ZeRO", "weights", "gradients", "state, masters", "all, with activations", "smallest device"]
    return f"Memory on each of {ranks} devices, {precision}\n{format_table(header, rows)}"


def activation_bytes(
    cfg: Mapping[str, Any], vocab_size: int, precision: str, micro_batch_size: int, context_length: int
) -> tuple[int, int]:
    """Return the bytes that autograd keeps in one micro-batch's forward pass, and those of the largest logits chunk."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(cfg, vocab_size)
        ids = torch.zeros(micro_batch_size, context_length, dtype=torch.long)
        positions = torch.arange(context_length).expand(micro_batch_size, -1)
        mixed = precision.endswith("mixed")
        dtype = torch.float16 if precision.startswith("16") else torch.bfloat16
        with torch.autocast("cpu", dtype=dtype, enabled=mixed), SavedBytes(model) as saved:
            hidden = model(ids, positions=positions).hidden
            linear_cross_entropy(hidden, model.lm_head.weight, ids)
        return saved.total, min(CHUNK_SCORES, micro_batch_size * context_length * vocab_size) * 4


def _rates(cfg: Mapping[str, Any], factories: Mapping[str, Any]) -> list[str]:
    """How the rate follows from the batch, for each batch size of the run."""
    lr, sizes = factories["lr"], dict.fromkeys(size for _, _, size in batch_ramp(cfg).stages)
    if needs_probe(cfg):
        return [f"  lr {brief(lr)} at the base batch; the rest follows from a noise scale that a probe measures first"]
    return [f"  {derivation(factories['scaling'], lr=lr, batch_tokens=size)}" for size in sizes]


def _work(ramp: BatchRamp, plan: BatchPlan, flops: float, kind: str, bf16: bool) -> str:
    steps, tokens = ramp.total_steps, ramp.tokens_seen(ramp.total_steps)
    device = torch.device(kind)
    peak = peak_flops(device, bf16=bf16)
    rows = [
        ["updates", f"{steps:_}"],
        ["tokens an update", f"{plan.batch_tokens:_}"],
        [
            "windows an update",
            f"{plan.windows} = accumulation {plan.accumulation} x devices {plan.world_size} "
            f"x micro_batch_size {plan.micro_batch_size}",
        ],
        ["tokens", f"{tokens:_}"],
        ["training FLOPs a token", format_count(flops)],
        ["training FLOPs", format_count(flops * tokens)],
        ["device peak", "n/a: unknown device" if peak is None else f"{peak / 1e12:.2f} TFLOP/s"],
    ]
    if peak is not None:
        seconds = flops * tokens / (peak * plan.world_size * ASSUMED_MFU)
        rows.append(["time", f"{format_seconds(seconds)} at an assumed MFU of {ASSUMED_MFU:.0%}"])
    return format_table(["what", "value"], rows)
