"""One training run, from a checked configuration to a finished run folder."""

import gc
import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from llm.callbacks.stop_signals import StopSignals
from llm.config.build import (
    build_data,
    build_model,
)
from llm.config.check import check
from llm.config.files import save
from llm.config.run import RunConfig, run_config
from llm.config.sizes import accelerator, batch_plan, planned_steps
from llm.errors import OutOfMemoryError, SpikeError
from llm.ops.allocator import keep_freed_memory
from llm.ops.products import keep_compiled_products
from llm.run_folder.checkpoint import FoundCheckpoint, find_last
from llm.run_folder.checkpoint_files import list_checkpoints
from llm.run_folder.folder import RunFolder
from llm.run_folder.rollback import read_rollbacks, roll_back
from llm.scaling.batching import BatchPlan
from llm.scaling.derivation import mismatch, rule_and_settings
from llm.training.build import build_module, build_run_trainer
from llm.training.module import LanguageModule
from llm.training.plan import describe_plan
from llm.training.spikes import RollbackGuard
from llm.training.start import chosen_micro_batch_size, load_initial_weights, measured_scaling

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
    load_initial_weights(run, model, data.tokenizer.bos_id)
    cfg["micro_batch_size"] = data.micro_batch_size = chosen_micro_batch_size(cfg, run, model, folder)
    plan = batch_plan(cfg)
    cfg["scaling"] = measured_scaling(cfg, model, data, folder)
    save(cfg, folder.path / "config.yaml")
    data.tokenizer.save(folder.path)
    module = build_module(cfg, run, model, data.tokenizer)
    trainer = build_run_trainer(cfg, run, folder, plan)
    _announce(cfg, folder, module, data, plan)
    ckpt_path = None if checkpoint is None else str(checkpoint.path)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except SpikeError as error:
        assert isinstance(module.guard.spikes, RollbackGuard)  # no other guard raises SpikeError
        roll_back(error, folder=folder, data=data, limits=module.guard.spikes)
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
    for line in found.skipped:
        log.warning("passed over %s", line)
    log.info("resuming from %s", found.path)
    folder.truncate_metrics(found.step)
    return found


def _is_complete(checkpoint: FoundCheckpoint | None, total_steps: int) -> bool:
    if checkpoint is None or checkpoint.step < total_steps:
        return False
    log.warning("already complete at step %d; to go on, raise max_steps (now %s)", checkpoint.step, total_steps)
    return True


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
    for line in module.model.cautions(context_length=plan.context_length, is_training=True):
        log.warning(line)
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
