"""Builds the LightningModule and the Trainer of a run."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import ProgressBar

from llm.callbacks.checkpoint_io import FolderCheckpointIO
from llm.config.build import (
    build_averaging,
    build_callbacks,
    build_evaluations,
    build_loggers,
    build_objective,
    build_trainer,
    module_factories,
    retuned_optimizer,
)
from llm.config.checked import CheckedConfig
from llm.distributed.launch import OWN_NAME, find_launch
from llm.evals.other_text import open_source, source_patterns
from llm.generate import generate_text
from llm.model.transformer import Transformer
from llm.ops.flops import peak_flops
from llm.ops.kernel_choice import KERNELS, KernelChoice
from llm.run_folder.backbone import BACKBONE, backbone_of
from llm.run_folder.folder import RunFolder
from llm.run_folder.provenance import config_hash, versions
from llm.training.module import LanguageModule
from llm.training.plan import describe_plan


def build_module(checked: CheckedConfig, model: Transformer, tokenizer: Any) -> LanguageModule:
    """Return the LightningModule: a decoder, the optimizer's factory, and the rules for its rate."""
    run, sizes = checked.run, checked.sizes
    optimizer, note = retuned_optimizer(checked.tree)
    module = LanguageModule(
        model=model,
        objective=build_objective(checked.tree, vocab_size=model.vocab_size, bos_id=tokenizer.bos_id),
        seed=run.seed,
        **module_factories(checked.tree, sizes.ramp, optimizer=optimizer),
        half_life_note=note,
        batch_tokens=run.batch_tokens,
        context_length=run.context_length,
        token_bytes=torch.as_tensor(tokenizer.token_bytes),
        on_nonfinite=run.on_nonfinite,
        qk_clip=run.qk_clip,
        generate=partial(generate_text, tokenizer=tokenizer),
    )
    compiles = sizes.accelerator == "cuda" and checked.tree["trainer"].get("stage") != 3  # its hooks do not compile
    if run.compile is True or (run.compile == "auto" and compiles):
        module.compile_model()
    return module


def build_run_trainer(
    checked: CheckedConfig,
    folder: RunFolder,
    kernels: KernelChoice,
    *,
    backbone: Path | None = None,
) -> L.Trainer:
    """Return the Trainer of a run, with its callbacks and loggers, and checkpoints that record kernels and backbone.

    Args:
        checked: the configuration.
        folder: the run folder.
        kernels: the kernels of the run.
        backbone: the folder of the frozen weights of an adapted run; None where all weights are saved.
    """
    tree, run, sizes = checked.tree, checked.run, checked.sizes
    supplied = {
        "run_folder": folder,
        "peak_flops": peak_flops(torch.device(sizes.accelerator), bf16="16" in sizes.precision),
        "checkpoint_every": run.checkpoint_every,
        "accumulation": sizes.plan.accumulation,
        "world_size": sizes.world_size,
        "config": dict(tree),
        "describe": partial(describe_plan, checked),
        "name": run.name,
        "evaluations": build_evaluations(tree),
        "precision": sizes.precision,
        "open_source": partial(open_source, checked, folder.path),
        "source_files": source_patterns(tree),
    }
    callbacks = build_callbacks(tree, **supplied)
    manifest = {"world_size": sizes.world_size, "versions": versions(), "config_hash": config_hash(tree)}
    manifest |= {KERNELS: asdict(kernels)}
    manifest |= {} if backbone is None else {BACKBONE: asdict(backbone_of(backbone))}
    return build_trainer(
        tree,
        sizes,
        default_root_dir=folder.path,
        max_steps=sizes.total_steps,
        accumulate_grad_batches=sizes.plan.accumulation,
        val_check_interval=run.val_every * sizes.plan.accumulation,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),  # not Lightning's own
        callbacks=[*callbacks, *build_averaging(tree)],  # averaging sees an update's end last
        logger=build_loggers(tree, **supplied),
        plugins=[FolderCheckpointIO(manifest=manifest), *own_environment()],
    )


def own_environment() -> list[LightningEnvironment]:
    """Return the plugin that makes Lightning take the ranks of this project, where no launcher has started any.

    Otherwise Lightning takes the variables of a Slurm, LSF or MPI allocation for ranks, also where the batch script
    starts a single process that then starts one process per device.
    """
    launch = find_launch()
    return [LightningEnvironment()] if launch is None or launch.name == OWN_NAME else []
