"""Refuses settings of a node that its parent decides, which would be ignored."""

from collections.abc import Mapping
from typing import Any

from llm.config.problems import Problem

DECIDED: Mapping[str, Mapping[str, str]] = {
    "trainer": {
        "max_steps": "set max_steps",
        "max_epochs": "set max_steps or max_tokens",
        "accumulate_grad_batches": "it follows from batch_tokens, context_length and micro_batch_size",
        "val_check_interval": "set val_every",
        "check_val_every_n_epoch": "set val_every",
        "num_sanity_val_steps": "no validation runs before training",
        "use_distributed_sampler": "the loader divides the windows among the ranks",
        "enable_model_summary": "plan=true prints the parameters",
        "enable_checkpointing": "set callbacks.checkpoints",
        "enable_progress_bar": "set callbacks.progress",
        "log_every_n_steps": "set callbacks.recorder.log_every",
        "gradient_clip_algorithm": "gradients are clipped by their norm",
        "sync_batchnorm": "no layer normalizes over the batch",
        "fast_dev_run": "set max_steps=1",
        "barebones": "set callbacks.<name>=null and logger=null",
        "min_epochs": "set max_steps or max_tokens",
        "min_steps": "set max_steps or max_tokens",
        "limit_train_batches": "set max_steps or max_tokens",
        "overfit_batches": "set data.files to a short text",
        "limit_test_batches": "a run has no test",
        "limit_predict_batches": "a run predicts nothing",
        "reload_dataloaders_every_n_epochs": "one loader has all windows of the run",
        "model_registry": "checkpoints are in the run folder",
        "enable_autolog_hparams": "config.yaml has every setting",
        "default_root_dir": "set hydra.run.dir",
        "callbacks": "set callbacks",
        "logger": "set logger",
        "plugins": "set trainer.precision or trainer.strategy",
    },
    "loader": {
        "source": "set data",
        "tokenizer": "set tokenizer",
        "context_length": "set context_length",
        "batch_tokens": "set batch_tokens",
        "micro_batch_size": "set micro_batch_size",
        "seed": "set seed",
        "ramp": "set batch_schedule",
    },
    "model": {"vocab_size": "set tokenizer.vocab_size"},
    "model.attention": {
        "geometry": "set model.d_model, num_heads, num_kv_heads and head_dim",
        "d_model": "set model.d_model",
        "num_heads": "set model.num_heads",
        "num_kv_heads": "set model.num_kv_heads",
        "head_dim": "set model.head_dim",
        "position": "set model/position",
        "layer_index": "layers are numbered in order",
    },
    "model.attention.codebook": {
        "head_dim": "set model.head_dim",
        "num_heads": "set model.num_kv_heads",
        "seed": "set seed",
    },
    "model.ffn": {"d_model": "set model.d_model"},
    "model.ffn.router": {
        "d_model": "set model.d_model",
        "num_experts": "set model.ffn.num_experts",
        "num_shared_experts": "set model.ffn.num_shared_experts",
        "top_k": "set model.ffn.top_k",
    },
    "model.ffn.balance": {"num_experts": "set model.ffn.num_experts", "top_k": "set model.ffn.top_k"},
    "model.first_ffn": {"d_model": "set model.d_model"},
    "model.init": {"model": "it is the model of the run", "num_layers": "set model.num_layers"},
    "model.norm": {"dim": "set model.d_model"},
    "model.position": {"head_dim": "set model.head_dim"},
    "optimizer": {"params": "groups are built from the model"},
    "objective": {"vocab_size": "set tokenizer.vocab_size", "bos_id": "set tokenizer"},
    "schedule": {"total_steps": "set max_steps or max_tokens", "step": "it is the number of the update"},
    "scaling": {"batch_tokens": "set batch_tokens"},
    "batch_schedule": {"batch_tokens": "set batch_tokens"},
}
"""Key of a node -> what to do instead, for the arguments that the parent supplies when it builds the node.

The parent's value wins over one in the node, so a setting there would have no effect.
"""


def decided_elsewhere(nodes: Mapping[str, Any]) -> list[Problem]:
    """Return the problem of each setting that the parent of its node decides."""
    problems = []
    for path, keys in DECIDED.items():
        node: Any = nodes
        for part in path.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if isinstance(node, Mapping):
            problems += [
                Problem(f"{path}.{k}", f"has no effect here; {keys[k]}", value=node[k]) for k in keys if k in node
            ]
    return problems
