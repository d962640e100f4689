"""Runs one training, from a configuration to a finished run folder."""

import gc
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from llm.callbacks.stop_signals import StopSignals
from llm.config.build import adapted, build_data, build_model
from llm.config.check import check
from llm.config.checked import CheckedConfig
from llm.config.files import save
from llm.config.resume import RESOLVED_FROM_AUTO
from llm.contracts import WorkerWatcher
from llm.errors import ConfigError, CrucibleError, OutOfMemoryError, SpikeError
from llm.ops.allocator import keep_freed_memory
from llm.ops.kernel_choice import KERNELS, using
from llm.ops.products import keep_compiled_products
from llm.run_folder.checkpoint import FoundCheckpoint, find_last
from llm.run_folder.checkpoint_files import WEIGHTS_ONLY, list_checkpoints, read_manifest
from llm.run_folder.folder import RunFolder
from llm.run_folder.rollback import read_rollbacks, roll_back
from llm.training.announce import announce, announce_result
from llm.training.forced_exit import ended_by_second_signal, kill_workers_at_exit
from llm.training.kernel_timing import decided_kernels
from llm.training.limits import check_open_files, check_shared_memory, limit_error
from llm.training.module import LanguageModule
from llm.training.module_and_trainer import build_module, build_run_trainer
from llm.training.plan import describe_plan
from llm.training.quiet import quiet_libraries
from llm.training.spikes import RollbackGuard
from llm.training.start import chosen_micro_batch_size, load_initial_weights, measured_scaling

log = logging.getLogger(__name__)


def train(config: CheckedConfig | Mapping[str, Any], path: Path) -> float | None:
    """Train in the run folder `path`; return the validation loss, or None where nothing was trained.

    Args:
        config: a checked configuration, or a plain one, which is checked first.
        path: the run folder.

    Raises:
        ConfigError: any mistake in the configuration, before any data or model is built.
        DataError: text that is missing, broken or too short.
        CheckpointError: there is nothing to resume from, or the checkpoint belongs to another model.
    """
    checked = config if isinstance(config, CheckedConfig) else check(config)
    if checked.run.plan:
        log.info(describe_plan(checked))
        return None
    folder = RunFolder(path, is_writer=rank_zero_only.rank == 0)
    check_open_files(checked.tree["loader"]["num_workers"])
    kill_workers_at_exit()
    folder.claim(resume=checked.run.resume is not None)
    try:
        with ended_by_second_signal():
            while (rolled_back := _train_until_spike(checked, folder)) is not None:
                resume = str(path) if list_checkpoints(folder.checkpoints) else None
                checked = replace(rolled_back, run=replace(rolled_back.run, resume=resume))
                gc.collect()  # trainer and module refer to each other, so the old weights would stay in memory
        return folder.read_summary().get("val/loss")
    finally:
        folder.release()


def _train_until_spike(checked: CheckedConfig, folder: RunFolder) -> CheckedConfig | None:
    """Train until the run ends, and return None; after a rollback return the configuration to continue with."""
    quiet_libraries()
    if checked.sizes.accelerator == "cpu":
        keep_freed_memory()
        keep_compiled_products()
    L.seed_everything(checked.run.seed, verbose=False)
    checkpoint = _checkpoint_to_resume(checked, folder)
    if _is_complete(checkpoint, checked.sizes.total_steps):
        return None
    data = build_data(checked.tree, checked.sizes)
    data.prepare_data()
    data.setup("fit")
    data.leave_out(entry["left_out"] for entry in read_rollbacks(folder))
    model = build_model(checked.tree, data.tokenizer.vocab_size)
    resumed = None if checkpoint is None else checkpoint.path
    source = load_initial_weights(checked, model, data.tokenizer.bos_id, resumed=resumed)
    model = adapted(checked.tree, model)
    data.micro_batch_size = chosen_micro_batch_size(checked, model, folder)
    if checked.run.micro_batch_size == "auto":
        folder.update({RESOLVED_FROM_AUTO: {"micro_batch_size": data.micro_batch_size}})
    checked = checked.with_micro_batch_size(data.micro_batch_size)
    check_shared_memory(checked.tree["loader"]["num_workers"], micro_batch_tokens=_micro_batch_tokens(checked))
    checked = checked.with_scaling(measured_scaling(checked, model, data, folder))
    if folder.is_writer:  # another rank may arrive here before the first one has claimed the folder
        save(checked.tree, folder.path / "config.yaml")
        data.tokenizer.save(folder.path)
    module = build_module(checked, model, data.tokenizer)
    recorded = None if checkpoint is None else (read_manifest(checkpoint.path) or {}).get(KERNELS, {})
    kernels = decided_kernels(
        *(checked, model, folder.path),
        flops_per_token=module.flops_per_token,
        cache=data.options.cache_dir,
        recorded=recorded,
    )
    folder.update({KERNELS: asdict(kernels)})
    if module.objective.is_bound:
        folder.update({"bound": True, "bound_samples": 1})
    backbone = source if checked.tree.get("adapt") else None
    trainer = build_run_trainer(checked, folder, kernels, backbone=backbone)
    announce(checked, folder, module, data)
    with using(kernels):
        is_over = _fit(checked, folder, trainer, module, data, checkpoint)
    if not is_over:
        return checked
    announce_result(folder)
    return None


def _fit(
    checked: CheckedConfig,
    folder: RunFolder,
    trainer: L.Trainer,
    module: LanguageModule,
    data: Any,
    checkpoint: FoundCheckpoint | None,
) -> bool:
    """Run Lightning's loop; return False where a spike rolled the run back to an earlier checkpoint."""
    ckpt_path = None if checkpoint is None else str(checkpoint.path)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except SpikeError as error:
        assert isinstance(module.guard.spikes, RollbackGuard)  # no other guard raises SpikeError
        roll_back(error, folder=folder, data=data, limits=module.guard.spikes)
        return False
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(_less_memory(checked, folder, trainer.global_step, error)) from error
    except CrucibleError:
        raise
    except Exception as error:  # torch raises the death of a worker from a signal handler, inside any call
        killed = data.killed_workers() if isinstance(data, WorkerWatcher) else []
        limit = limit_error(error, killed_workers=killed, micro_batch_tokens=_micro_batch_tokens(checked))
        if limit is None:
            raise
        raise limit from error
    except SystemExit:  # a second Ctrl-C, after which Lightning exits with status 1
        _exit_if_stopped(trainer, folder)
        raise
    _exit_if_stopped(trainer, folder)
    return True


def _checkpoint_to_resume(checked: CheckedConfig, folder: RunFolder) -> FoundCheckpoint | None:
    if checked.run.resume is None:
        return None
    found = find_last(folder.path)
    for line in found.skipped:
        log.warning("skipped %s", line)
    if how := (read_manifest(found.path) or {}).get(WEIGHTS_ONLY):
        raise ConfigError(
            f"resume={folder.path}: its weights were made by {how} and have no optimizer state to resume; start a run "
            f"with init_from={folder.path} and the model settings of its config.yaml"
        )
    log.info("resuming from %s", found.path)
    folder.truncate_metrics(found.step)
    return found


def _is_complete(checkpoint: FoundCheckpoint | None, total_steps: int) -> bool:
    if checkpoint is None or checkpoint.step < total_steps:
        return False
    log.warning("already complete at step %d; to train longer, raise max_steps (now %s)", checkpoint.step, total_steps)
    return True


def _micro_batch_tokens(checked: CheckedConfig) -> int:
    plan = checked.sizes.plan
    return plan.micro_batch_size * plan.context_length


def _less_memory(checked: CheckedConfig, folder: RunFolder, step: int, error: BaseException) -> str:
    micro, saved = checked.sizes.plan.micro_batch_size, list_checkpoints(folder.checkpoints)
    again = f"resume={folder.path}" if saved else "the same command"
    less = f"micro_batch_size={max(1, micro // 2)}" if micro > 1 else "trainer=deepspeed trainer.stage=3"
    return (
        f"micro_batch_size={micro}: out of memory at step {step + 1} ({next(iter(str(error).splitlines()), '')}); "
        f"run {again} {less}, or add model.activation_checkpointing=true; plan=true prints the memory by part"
    )


def _exit_if_stopped(trainer: L.Trainer, folder: RunFolder) -> None:
    """Exit with 128 + n where signal n stopped the run."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    stop = next((c.signal for c in callbacks if isinstance(c, StopSignals) and c.signal), None)
    if stop is not None:
        log.warning("stopped by %s at step %d; continue with resume=%s", stop.name, trainer.global_step, folder.path)
        raise SystemExit(128 + stop)
