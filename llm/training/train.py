"""One training run, from a checked configuration to a finished run folder."""

import gc
import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from llm.allocator import keep_freed_memory
from llm.batching import BatchPlan
from llm.callbacks.stop_signals import StopSignals
from llm.checking import check
from llm.checkpoint import FolderCheckpointIO, FoundCheckpoint, compare_state, find_last, load_model
from llm.checkpoint_files import list_checkpoints
from llm.config import (
    RunConfig,
    accelerator,
    batch_plan,
    batch_ramp,
    build_averaging,
    build_callbacks,
    build_data,
    build_evaluations,
    build_loggers,
    build_model,
    build_trainer,
    micro_batch_sizes,
    module_factories,
    needs_probe,
    planned_steps,
    retuned_optimizer,
    run_config,
    save,
)
from llm.errors import ConfigError, OutOfMemoryError, SpikeError
from llm.flops import peak_flops
from llm.generate import generate_text
from llm.huggingface.folder import is_hf_folder
from llm.huggingface.load import load_hf_weights
from llm.launch import find_launch
from llm.loss import linear_cross_entropy
from llm.memory import SavedBytes
from llm.micro_batch import find_micro_batch_size
from llm.module import LanguageModule, rated_groups
from llm.noise_probe import PROBE_PATIENCE, PROBE_REMEDY, PROBE_UPDATES, measure_noise_scale
from llm.other_text import open_source, source_patterns
from llm.plan import describe_plan
from llm.precision import resolve_precision
from llm.products import keep_compiled_products
from llm.provenance import config_hash, versions
from llm.rendezvous import agree, smallest
from llm.rollback import go_back, read_rollbacks
from llm.run_folder import RunFolder
from llm.scaling.derivation import mismatch, rule_and_settings
from llm.transformer import Transformer

log = logging.getLogger(__name__)


def train(cfg: dict[str, Any], path: Path) -> float | None:
    """Train as `cfg` says in the run folder `path`; return the validation loss, or None where nothing was trained.

    Raises:
        ConfigError: any mistake in the configuration, before data or model.
        DataError: text that is missing, broken or too short.
        CheckpointError: nothing to resume from, or something else than was asked for.
    """
    check(cfg)
    run = run_config(cfg)
    if run.plan:
        log.info(describe_plan(cfg))
        return None
    folder = RunFolder(path, is_writer=rank_zero_only.rank == 0)
    folder.claim(resume=run.resume is not None)
    try:
        while not _train(cfg, run, folder):  # it went back to a checkpoint, or to its beginning
            run = replace(run_config(cfg), resume=str(path) if list_checkpoints(folder.checkpoints) else None)
            gc.collect()  # trainer and module know each other: the old weights would stay beside the new ones
        return folder.read_summary().get("val/loss")
    finally:
        folder.release()


def _train(cfg: dict[str, Any], run: RunConfig, folder: RunFolder) -> bool:
    """Train until the run ends; return False where it has to go on from an earlier checkpoint instead."""
    quiet_lightning()
    if accelerator(cfg["trainer"]) == "cpu":
        keep_freed_memory()
        keep_compiled_products()
    L.seed_everything(run.seed, verbose=False)
    checkpoint = _checkpoint_to_resume(run, folder)
    if _is_complete(checkpoint, planned_steps(cfg)):
        return True
    data = build_data(cfg, batch_plan(cfg).micro_batch_size)
    data.prepare_data()
    data.setup("fit")
    data.leave_out(entry["left_out"] for entry in read_rollbacks(folder))
    model = build_model(cfg, data.tokenizer.vocab_size)
    _load_initial_weights(run, model, data.tokenizer.bos_id)
    cfg["micro_batch_size"] = data.micro_batch_size = _micro_batch_size(cfg, run, model, folder)
    plan = batch_plan(cfg)
    cfg["scaling"] = _measured_scaling(cfg, model, data, folder)
    save(cfg, folder.path / "config.yaml")
    data.tokenizer.save(folder.path)
    module = build_module(cfg, run, model, data.tokenizer)
    trainer = _build_trainer(cfg, run, folder, plan)
    _announce(cfg, folder, module, data, plan)
    ckpt_path = None if checkpoint is None else str(checkpoint.path)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except SpikeError as error:
        go_back(error, folder=folder, data=data, guard=module.spikes)
        return False
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(_what_takes_less(cfg, folder, trainer.global_step, error)) from error
    except SystemExit:  # a second Ctrl-C, for which Lightning leaves with 1
        _leave_if_stopped(trainer, folder)
        raise
    _leave_if_stopped(trainer, folder)
    _tell_result(folder)
    return True


def quiet_lightning() -> None:
    """Silence what Lightning says about itself, and all ranks but the first; warnings about the run stay."""
    if rank_zero_only.rank != 0:
        logging.getLogger("llm").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*LeafSpec.*",
        ".*smaller than the logging interval.*",
        ".*does not have many workers.*",
        ".*your dataloader is not resumable.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def _checkpoint_to_resume(run: RunConfig, folder: RunFolder) -> FoundCheckpoint | None:
    if run.resume is None:
        return None
    found = find_last(folder.path)
    for line in found.passed_over:
        log.warning("passed over %s", line)
    log.info("resuming from %s", found.path)
    folder.truncate_metrics(found.step)
    return found


def _is_complete(checkpoint: FoundCheckpoint | None, total_steps: int) -> bool:
    if checkpoint is None or checkpoint.step < total_steps:
        return False
    log.warning("already complete at step %d; to go on, raise max_steps (now %s)", checkpoint.step, total_steps)
    return True


def _load_initial_weights(run: RunConfig, model: Transformer, bos_id: int) -> None:
    if run.init_from is None:
        return
    source = Path(run.init_from)
    if is_hf_folder(source):
        hf_state = load_hf_weights(source, model, context_length=run.context_length, bos_id=bos_id)
        model.load_state_dict(hf_state)
        log.info("weights from %s", source)
        return
    folder = source if (source / "manifest.json").is_file() else find_last(source, key="init_from").path
    state = model_state(folder)
    compare_state(state, model.state_dict(), source=f"init_from={folder}")
    model.load_state_dict(state)
    log.info("weights from %s", folder)


def model_state(folder: Path) -> dict[str, torch.Tensor]:
    """Return the decoder's own weights from a checkpoint folder."""
    return {name.removeprefix("model."): tensor for name, tensor in load_model(folder).items()}


def _micro_batch_size(cfg: dict[str, Any], run: RunConfig, model: Transformer, folder: RunFolder) -> int:
    """Return micro_batch_size; where it is auto, the largest that fits every rank, tried in the run's own precision."""
    if run.micro_batch_size != "auto":
        return run.micro_batch_size
    launch, device = find_launch(), torch.device(accelerator(cfg["trainer"]))
    if launch is not None and device.type == "cuda":
        device = torch.device("cuda", launch.local_rank)
    precision = resolve_precision(cfg["trainer"]["precision"], accelerator=device.type)
    trial = partial(trial_step, model.to(device), device=device, precision=precision, context_length=run.context_length)
    sizes = micro_batch_sizes(cfg)
    found = find_micro_batch_size(trial, candidates=sizes, device=device, context_length=run.context_length)
    return found if launch is None else smallest(found, launch, about=f"micro_batch_size of {folder.path}")


def _measured_scaling(cfg: Mapping[str, Any], model: Transformer, data: Any, folder: RunFolder) -> dict[str, Any]:
    """Return the scaling rule's node; where a noise scale is to be measured and is needed, with that of a probe.

    Of several ranks the first measures, and the others wait for what it finds.
    """
    node, launch = dict(cfg["scaling"]), find_launch()
    if not needs_probe(cfg):
        return node
    try:
        found = _probe_noise_scale(cfg, model, data) if launch is None or launch.rank == 0 else ""
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "scaling.noise_scale=measured: the probe trains a copy of the model on one device, which has no room for "
            f"it; {PROBE_REMEDY}"
        ) from error
    if launch is not None:
        found = agree(found, launch, about=f"noise scale of {folder.path}", patience=PROBE_PATIENCE)
    node["noise_scale"] = float(found)
    log.info("noise scale  %s tokens, measured by a probe at the base batch", f"{node['noise_scale']:_.0f}")
    return node


def _probe_noise_scale(cfg: Mapping[str, Any], model: Transformer, data: Any) -> str:
    """Return the noise scale in tokens, to three digits, from a probe on this process's device."""
    base = cfg["scaling"]["base_batch_tokens"]
    factories, total = module_factories(cfg), max(planned_steps(cfg), PROBE_UPDATES)
    device = torch.device(accelerator(cfg["trainer"]))
    precision = resolve_precision(cfg["trainer"]["precision"], accelerator=device.type)
    dtype = torch.float16 if precision.startswith("16") else torch.bfloat16
    dataset = data.windows("train")
    enough = -(-PROBE_UPDATES * base // batch_ramp(cfg).batch_tokens_at(0))
    groups = partial(rated_groups, **{key: factories[key] for key in ("rates", "optimizer", "lr", "weight_decay")})
    windows = measure_noise_scale(
        model.to(device),
        windows=chain.from_iterable(data.train_sampler(total_steps=enough)),
        read=lambda part: {name: tensor.to(device) for name, tensor in dataset.__getitems__(part).items()},  # type: ignore
        windows_per_update=base // cfg["context_length"],
        micro_batch_size=data.micro_batch_size,
        build_optimizer=lambda probe: factories["optimizer"](groups(probe)),
        lr_factor=lambda step: factories["schedule"](step, total_steps=total),
        clip=cfg["trainer"].get("gradient_clip_val"),
        autocast=lambda: torch.autocast(device.type, dtype=dtype, enabled=precision.endswith("mixed")),
    )
    return f"{windows * cfg['context_length']:.3g}"


def trial_step(model: Transformer, windows: int, *, device: torch.device, precision: str, context_length: int) -> int:
    """Run forward and backward on `windows` windows of zeros; return the bytes kept for the backward pass."""
    ids = torch.zeros(windows, context_length, dtype=torch.long, device=device)
    positions = torch.arange(context_length, device=device).expand(windows, -1)
    dtype = torch.float16 if precision.startswith("16") else torch.bfloat16
    random_state = torch.get_rng_state()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # a codebook takes its codes from zeros
    with torch.autocast(device.type, dtype=dtype, enabled=precision.endswith("mixed")), SavedBytes(model) as saved:
        hidden = model(ids, positions=positions, document_ids=torch.zeros_like(ids)).hidden
        loss = linear_cross_entropy(hidden, model.lm_head.weight, ids)
    loss.backward()
    model.zero_grad(set_to_none=True)
    model.load_state_dict(buffers, strict=False)
    torch.set_rng_state(random_state)
    return saved.total


def build_module(cfg: Mapping[str, Any], run: RunConfig, model: Transformer, tokenizer: Any) -> LanguageModule:
    """Put a decoder, the optimizer's factory, and the rules for its rate into the Lightning module."""
    optimizer, note = retuned_optimizer(cfg)
    module = LanguageModule(
        model=model,
        **module_factories({**cfg, "optimizer": optimizer}),
        half_life_note=note,
        batch_tokens=run.batch_tokens,
        context_length=run.context_length,
        token_bytes=torch.as_tensor(tokenizer.token_bytes),
        on_nonfinite=run.on_nonfinite,
        generate=partial(generate_text, tokenizer=tokenizer),
    )
    by_itself = accelerator(cfg["trainer"]) == "cuda" and cfg["trainer"].get("stage") != 3  # its hooks do not compile
    if run.compile is True or (run.compile == "auto" and by_itself):
        module.compile_model()
    return module


def _build_trainer(cfg: Mapping[str, Any], run: RunConfig, folder: RunFolder, plan: BatchPlan) -> L.Trainer:
    device = torch.device(accelerator(cfg["trainer"]))
    precision = resolve_precision(cfg["trainer"]["precision"], accelerator=device.type)
    supplied = {
        "run_folder": folder,
        "peak_flops": peak_flops(device, bf16="16" in precision),
        "checkpoint_every": run.checkpoint_every,
        "accumulation": plan.accumulation,
        "world_size": plan.world_size,
        "config": dict(cfg),
        "describe": partial(describe_plan, cfg),
        "name": run.name,
        "evaluations": build_evaluations(cfg),
        "precision": precision,
        "open_source": partial(open_source, cfg, folder.path),
        "source_files": source_patterns(cfg),
    }
    manifest = {"world_size": plan.world_size, "versions": versions(), "config_hash": config_hash(cfg)}
    return build_trainer(
        cfg,
        default_root_dir=folder.path,
        max_steps=planned_steps(cfg),
        accumulate_grad_batches=plan.accumulation,
        val_check_interval=run.val_every * plan.accumulation,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        callbacks=[*build_callbacks(cfg, **supplied), *build_averaging(cfg)],  # averaging sees an update's end last
        logger=build_loggers(cfg, **supplied),
        plugins=[FolderCheckpointIO(manifest=manifest)],
    )


def _announce(cfg: Mapping[str, Any], folder: RunFolder, module: LanguageModule, data: Any, plan: BatchPlan) -> None:
    parameters = sum(p.numel() for p in module.model.parameters())
    steps, tokens = module.total_steps, module.tokens_seen(module.total_steps)
    log.info("run folder   %s", folder.path)
    log.info("model        %s, %s parameters, vocabulary %s", cfg["name"], f"{parameters:_}", data.tokenizer.vocab_size)
    log.info("data         %s train tokens, %s validation tokens", f"{data.train_tokens:_}", f"{data.val_tokens:_}")
    log.info(
        "batch        %s tokens = accumulation %d x devices %d x %d windows of %d",
        *(f"{plan.batch_tokens:_}", plan.accumulation, plan.world_size, plan.micro_batch_size, plan.context_length),
    )
    log.info("steps        %s, %s tokens, %.2f epochs", f"{steps:_}", f"{tokens:_}", tokens / data.train_tokens)
    for line in module.lr_derivation:
        log.info(line)
    warning = mismatch(rule_and_settings(module.scaling)[0], getattr(module.build_optimizer, "func", object))
    if warning and any("->" in line for line in module.lr_derivation):
        log.warning(warning)


def _what_takes_less(cfg: Mapping[str, Any], folder: RunFolder, step: int, error: BaseException) -> str:
    micro, saved = cfg["micro_batch_size"], list_checkpoints(folder.checkpoints)
    again = f"resume={folder.path}" if saved else "the same command"
    less = f"micro_batch_size={max(1, micro // 2)}" if micro > 1 else "trainer=deepspeed trainer.stage=3"
    return (
        f"micro_batch_size={micro}: no memory is left at step {step + 1} ({next(iter(str(error).splitlines()), '')}); "
        f"go on with {again} {less}, or with model.activation_checkpointing=true; plan=true shows what takes how much"
    )


def _leave_if_stopped(trainer: L.Trainer, folder: RunFolder) -> None:
    """Leave with 128 + n where signal n stopped the run."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    stop = next((c.signal for c in callbacks if isinstance(c, StopSignals) and c.signal), None)
    if stop is not None:
        log.warning("stopped by %s at step %d; go on with resume=%s", stop.name, trainer.global_step, folder.path)
        raise SystemExit(128 + stop)


def _tell_result(folder: RunFolder) -> None:
    summary = folder.read_summary()
    log.info("val/loss     %.4f nats a token", summary["val/loss"])
    if summary.get("bits_per_byte") is not None:
        log.info("             %.4f bits per byte", summary["bits_per_byte"])
    log.info("run folder   %s", folder.path)
