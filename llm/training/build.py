"""Builds the LightningModule and the Trainer of a run."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning as L
import torch

from llm.callbacks.checkpoint_io import FolderCheckpointIO
from llm.config.build import (
    build_averaging,
    build_callbacks,
    build_evaluations,
    build_loggers,
    build_trainer,
    module_factories,
    retuned_optimizer,
)
from llm.config.run import RunConfig
from llm.config.sizes import accelerator, planned_steps
from llm.evals.other_text import open_source, source_patterns
from llm.generate import generate_text
from llm.model.transformer import Transformer
from llm.ops.flops import peak_flops
from llm.ops.precision import resolve_precision
from llm.run_folder.folder import RunFolder
from llm.run_folder.provenance import config_hash, versions
from llm.scaling.batching import BatchPlan
from llm.training.module import LanguageModule
from llm.training.plan import describe_plan


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


def build_run_trainer(cfg: Mapping[str, Any], run: RunConfig, folder: RunFolder, plan: BatchPlan) -> L.Trainer:
    """Return the Trainer of a run, with its callbacks, loggers and checkpoint folders."""
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
