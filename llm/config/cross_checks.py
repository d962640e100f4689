"""Checks the rules of a configuration that span several groups, such as batch arithmetic and learning rates."""

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import yaml

from llm.config.build import (
    build_averaging,
    build_evaluations,
    build_meta_model,
    build_objective,
    build_rates,
    build_scaling,
    build_tokenizer,
)
from llm.config.conf import conf_folder
from llm.config.piece_signature import keyword_parameters
from llm.config.pieces import instantiate, piece_signature
from llm.config.signatures import locate
from llm.config.sizes import (
    accelerator,
    batch_plan,
    batch_ramp,
    least_micro_batches,
    micro_batch_sizes,
    needs_probe,
    world_size,
)
from llm.contracts import GradientFolder, HasTraits, NonFiniteShrinker, TrainerChecker, WeightAverager
from llm.errors import ConfigError, CrucibleError
from llm.model.transformer import Transformer
from llm.ops.kernel_choice import given_kernels
from llm.ops.precision import resolve_precision
from llm.optim.param_groups import build_param_groups
from llm.optim.qk_clip import check_threshold, meters_of
from llm.scaling.batching import check_ramp
from llm.scaling.noise_estimate import PROBE_REMEDY

REMEDIES = {"base_batch_tokens": "the tokens per update at which optimizer.lr was tuned"}
"""Keys that a batch rule needs, with the value to set."""


def check_across_groups(cfg: Mapping[str, Any], *, invalid: Collection[str]) -> list[str]:
    """Return the mistakes that span several groups: batch arithmetic, rates, and the rules of the model's own pieces.

    Args:
        cfg: a plain configuration without unknown keys.
        invalid: groups and run-level keys that are known to be wrong. Checks that read one of them are skipped.
    """
    run_keys = {"max_steps", "max_tokens", "batch_tokens", "context_length", "micro_batch_size"}
    model = functools.cache(lambda: build_meta_model(cfg))
    probes: list[tuple[set[str], Callable[[], Any]]] = [
        (run_keys | {"batch_schedule"}, lambda: batch_ramp(cfg)),
        (run_keys | {"batch_schedule", "trainer"}, lambda: check_ramp(plan=batch_plan(cfg), ramp=batch_ramp(cfg))),
        (run_keys | {"callbacks", "trainer"}, lambda: _check_micro_batches(cfg)),
        ({"optimizer", "on_nonfinite", "trainer", "spikes", "rates"}, lambda: _check_optimizer(cfg)),
        (run_keys | {"scaling", "batch_schedule", "optimizer"}, lambda: _check_scaling(cfg)),
        (run_keys | {"batch_schedule", "keep_half_life"}, lambda: _check_half_life(cfg)),
        (run_keys | {"schedule"}, lambda: _check_schedule(cfg)),
        ({"trainer"}, lambda: resolve_precision(cfg["trainer"]["precision"], accelerator=accelerator(cfg["trainer"]))),
        ({"trainer", "compile"}, lambda: _check_trainer(cfg)),
        ({"model", "rates", "objective"}, model),
        ({"model", "rates", "objective", "context_length"}, lambda: _check_objective(cfg, model())),
        ({"model", "rates", "optimizer", "objective"}, lambda: _check_tensors(cfg["optimizer"], model())),
        ({"optimizer", "rates"}, lambda: build_rates(cfg).check(instantiate(cfg["optimizer"]))),
        (
            {"model", "rates", "objective", "qk_clip", "adapt", "context_length"},
            lambda: _check_logit_clip(cfg, model()),
        ),
        ({"kernels"}, lambda: given_kernels(cfg.get("kernels", "auto"))),
        ({"data"}, lambda: instantiate(cfg["data"])),
        ({"data", "loader"}, lambda: _check_held_out_share(cfg)),
        ({"tokenizer"}, lambda: build_tokenizer(cfg)),
        ({"spikes"}, lambda: instantiate(cfg.get("spikes") or {})),
        ({"eval"}, lambda: build_evaluations(cfg)),
        ({"grow", "adapt", "init_from", "trainer", "averaging"}, lambda: _check_start(cfg)),
        (run_keys | {"averaging", "trainer", "batch_schedule"}, lambda: _check_averaging(cfg)),
    ]
    problems = []
    for keys, probe in probes:
        if keys & set(invalid):
            continue
        try:
            probe()
        except CrucibleError as error:
            problems += [line for line in str(error).splitlines() if line not in problems]
        except TypeError as error:  # neither the node nor its parent gives an argument of a factory
            problems.append(f"{'/'.join(sorted(keys))}: {error}; compare its file in conf/ with the class it names")
    return problems


def _check_micro_batches(cfg: Mapping[str, Any]) -> None:
    """Refuse an update of fewer micro-batches than a callback compares."""
    plan, (least, callback) = batch_plan(cfg), least_micro_batches(cfg)
    if plan.accumulation * plan.world_size >= least:
        return
    smaller = [n for n in micro_batch_sizes(cfg) if plan.windows // n >= least]
    remedy = f"micro_batch_size={smaller[0]}" if smaller else f"batch_tokens={least * cfg['context_length']} or more"
    raise ConfigError(
        f"micro_batch_size={cfg['micro_batch_size']}: leaves one micro-batch per update on one device, and "
        f"callbacks.{callback} compares at least {least}; set {remedy}"
    )


def _check_averaging(cfg: Mapping[str, Any]) -> None:
    """Refuse an average that would first exist after the run."""
    steps = batch_ramp(cfg).total_steps
    for averager in build_averaging(cfg):
        if isinstance(averager, WeightAverager) and averager.first_average > steps:
            key = "start" if "start" in cfg["averaging"] else "every"
            raise ConfigError(
                f"averaging.{key}={cfg['averaging'][key]}: the first average would follow update "
                f"{averager.first_average} of a run of {steps}; lower it, or set averaging=null"
            )


def _check_start(cfg: Mapping[str, Any]) -> None:
    """Refuse growth and adaptation without trained weights, and what does not work on frozen ones."""
    for key in ("grow", "adapt"):
        if cfg.get(key) and cfg.get("init_from") is None:
            raise ConfigError(f"{key}: needs the weights of a trained run; add init_from=<run folder>")
    if not cfg.get("adapt"):
        return
    if cfg.get("grow"):
        raise ConfigError("adapt: frozen weights are stored by name and hash, and grown ones have none; remove grow")
    if cfg["trainer"].get("stage") == 3:
        raise ConfigError(
            "adapt: trainer.stage=3 shards trained weights alone, and most are frozen; use trainer.stage=2"
        )
    if cfg.get("averaging"):
        raise ConfigError(
            "adapt: averaging copies the frozen weights into every checkpoint; use eval.py average=5 afterwards"
        )


def _check_logit_clip(cfg: Mapping[str, Any], model: Transformer) -> None:
    """Refuse a threshold out of range, frozen weights, and a model without logits."""
    if cfg.get("qk_clip") is None:
        return
    if check_threshold(cfg["qk_clip"]) <= (least := math.log(cfg["context_length"])):
        raise ConfigError(
            f"qk_clip={cfg['qk_clip']}: log(context_length)={least:.1f} is the measure of equal logits, which would be "
            "clipped in each update; set a larger one, such as 30"
        )
    if cfg.get("adapt"):
        raise ConfigError(f"qk_clip={cfg['qk_clip']}: adapt freezes the queries and keys to shrink; set qk_clip=null")
    meters_of(model.attentions())


def _check_schedule(cfg: Mapping[str, Any]) -> None:
    steps = batch_ramp(cfg).total_steps
    schedule = instantiate(cfg["schedule"])
    for step in (0, steps - 1):
        schedule(step, total_steps=steps)


def _check_scaling(cfg: Mapping[str, Any]) -> None:
    """Compute the rate for every batch size of the run. An unmeasured noise scale counts as the batch."""
    node = dict(cfg["scaling"])
    rule = str(node["_target_"]).rpartition(".")[2]
    asked = [n for n, p in keyword_parameters(locate(node["_target_"])).items() if p.kind is p.KEYWORD_ONLY]
    lines = [
        f"scaling.{name}: missing; the {rule} rule needs it: set {REMEDIES.get(name, 'what its file in conf/ does')}"
        for name in asked
        if name not in node
    ]
    if lines:
        raise ConfigError("\n".join(lines))
    ramp = batch_ramp(cfg)
    if needs_probe(cfg, ramp):
        _check_probe(cfg)
    scaling = build_scaling(cfg, noise_scale=float(cfg["batch_tokens"]) if needs_probe(cfg, ramp) else None)
    for _, _, batch_tokens in ramp.stages:
        scaling(batch_tokens)


def _check_half_life(cfg: Mapping[str, Any]) -> None:
    if cfg["keep_half_life"] and len(batch_ramp(cfg).stages) > 1:
        raise ConfigError(
            "keep_half_life=true: an optimizer's averages have one decay for the whole run, and batch_schedule changes "
            "the batch; set keep_half_life=false, or batch_schedule=constant"
        )


def _check_probe(cfg: Mapping[str, Any]) -> None:
    base, context = cfg["scaling"].get("base_batch_tokens"), cfg["context_length"]
    if cfg["optimizer"].get("accumulate") == "momentum":
        raise ConfigError(
            "scaling.noise_scale=measured: optimizer.accumulate=momentum leaves no gradients to measure; set "
            f"optimizer.accumulate=buffer, or {PROBE_REMEDY}"
        )
    if isinstance(base, int) and base > 0 and (base % context or base < 2 * context):
        raise ConfigError(
            f"scaling.noise_scale=measured: scaling.base_batch_tokens={base} must hold at least two windows of "
            f"context_length {context}, and whole ones, to compare their gradients; {PROBE_REMEDY}"
        )


def _check_held_out_share(cfg: Mapping[str, Any]) -> None:
    """Refuse a share to hold out that somebody has set, where the data has a validation set of its own."""
    share = (cfg["loader"] or {}).get("val_fraction")
    default = yaml.safe_load((conf_folder() / "train.yaml").read_text(encoding="utf-8"))["loader"]["val_fraction"]
    if share not in (None, default) and instantiate(cfg["data"]).validation is not None:
        raise ConfigError(
            f"loader.val_fraction={share}: the data has a validation set of its own, so no share of it is held out; "
            "remove loader.val_fraction"
        )


def check_rates(node: Mapping[str, Any]) -> None:
    """Refuse a learning rate of an optimizer's node that is not above 0, and a negative weight decay."""
    problems = []
    for name, rule, is_valid, usual in (
        ("lr", "above 0", lambda value: 0 < value < math.inf, "4e-3 suits adamw at tiny"),
        ("weight_decay", "at least 0", lambda value: 0 <= value < math.inf, "0.1 is usual"),
    ):
        value = node.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not is_valid(value):
            what = rule if is_number else f"a number {rule}"
            problems.append(f"optimizer.{name}={value}: must be {what}; {usual}")
    if problems:
        raise ConfigError("\n".join(problems))


def _check_optimizer(cfg: Mapping[str, Any]) -> None:
    node, policy = cfg["optimizer"], cfg["on_nonfinite"]
    check_rates(node)
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    decay = node["weight_decay"] if "matrix" in build_rates(cfg).decay_kinds else 0.0
    group = {"params": [parameter], "names": ["probe"], "kind": "matrix", "lr": node["lr"], "weight_decay": decay}
    try:
        optimizer = instantiate(node)([group])
    except ValueError as error:
        raise ConfigError(f"optimizer: {error}; see the docstring of {node['_target_']}") from error
    shrinks = isinstance(optimizer, NonFiniteShrinker) and optimizer.shrink_ratio is not None
    if shrinks != (policy == "tiger"):
        raise ConfigError(
            f"on_nonfinite={policy}: on_nonfinite=tiger and optimizer.shrink_ratio need each other; "
            "set optimizer=tiger optimizer.shrink_ratio=0.99 on_nonfinite=tiger together, or none of them"
        )
    if isinstance(optimizer, GradientFolder) and optimizer.folds_gradients:
        if world_size(cfg["trainer"]) > 1 or "stage" in cfg["trainer"]:
            raise ConfigError(
                "optimizer.accumulate=momentum: works on one device with whole tensors; set optimizer.accumulate=buffer"
            )
        clip = cfg["trainer"].get("gradient_clip_val")
        if clip or policy == "skip" or cfg.get("spikes"):
            spikes = instantiate(cfg["spikes"]) if cfg.get("spikes") else None
            key = "on_nonfinite=skip" if spikes is None else f"spikes={'rollback' if spikes.goes_back else 'skip'}"
            key = f"trainer.gradient_clip_val={clip}" if clip else key
            raise ConfigError(
                f"{key}: optimizer.accumulate=momentum leaves no gradient to act on; set "
                "trainer.gradient_clip_val=null and on_nonfinite=raise or tiger, or optimizer.accumulate=buffer"
            )


def _check_objective(cfg: Mapping[str, Any], model: Transformer) -> None:
    """Refuse an objective that does not fit the windows, and an attention that does not serve its sight."""
    objective = build_objective(cfg, vocab_size=model.vocab_size, bos_id=0)
    objective.check(context_length=cfg["context_length"])
    try:
        model.check_sight(objective.sight)
    except ConfigError as error:
        raise ConfigError(f"objective={objective.name}: {error}, or objective=next_token") from error


def _check_tensors(node: Mapping[str, Any], model: torch.nn.Module) -> None:
    """Refuse an optimizer of the project that cannot update the tensors of a model, which have no storage."""
    if isinstance(locate(node["_target_"]), HasTraits):  # torch's fused optimizers refuse tensors without storage
        instantiate(node)(build_param_groups(model, lr=1.0, weight_decay=0.0), lr=1.0, weight_decay=0.0)


def _check_trainer(cfg: Mapping[str, Any]) -> None:
    """Check a trainer by its own rules, and refuse 16-bit weights that have no fp32 masters."""
    node = cfg["trainer"]
    signature = piece_signature(node["_target_"])  # Lightning's own trainer is not imported for this check
    factory = locate(node["_target_"]) if signature is None or "check_settings" in signature.members else None
    precision = resolve_precision(node["precision"], accelerator=accelerator(node))
    if isinstance(factory, TrainerChecker):
        factory.check_settings(node, precision=precision, compiled=cfg["compile"] is True)
    elif precision == "bf16-true":
        raise ConfigError(
            "trainer.precision=bf16-true: bf16 weights without fp32 masters round small updates away; use "
            "trainer.precision=bf16-mixed, or trainer=deepspeed trainer.stage=2, which keeps masters"
        )
