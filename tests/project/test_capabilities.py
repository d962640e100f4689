"""Optional capabilities are Protocols: each has an implementer that conf/ reaches, and none is found by a string."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from catalogue import CONF, options

from llm import contracts
from llm.config.build import build_data, build_loggers, build_model
from llm.config.check import check
from llm.ops.kernel_choice import DEFAULT
from llm.ops.noise import KeyedNoise
from llm.run_folder.folder import RunFolder
from llm.training.module_and_trainer import build_module, build_run_trainer

PROTOCOLS = {
    name: value
    for name, value in vars(contracts).items()
    if inspect.isclass(value) and getattr(value, "_is_protocol", False) and value.__module__ == contracts.__name__
}
VQ = ("model/attention=vq", "model/position=none")
MODELS = [(f"model={name}",) for name in options("model")] + [("model.attention.qk_norm=true",), VQ]

GREEDY = {"temperature": 0.0, "top_k": None, "top_p": None, "seed": 0}

FOREIGN = {
    ("llm/optim/shard_steps.py", "_layouts"): "an optimizer that was unpickled without its own state",
    ("llm/model/ffn/grouped.py", "grouped_mm"): "a function of newer versions of torch",
    ("llm/ops/products.py", "_linear_pointwise"): "an operator of torch builds with oneDNN",
    ("llm/ops/precision.py", "get_capabilities"): "a function of newer versions of torch",
    ("llm/config/piece_signature.py", "__module__"): "any object that a configuration names",
    ("llm/config/signatures.py", "__name__"): "a type annotation",
    ("llm/report/runs.py", "CSafeLoader"): "PyYAML without its C extension",
    ("llm/sweep/job_progress.py", "CSafeLoader"): "PyYAML without its C extension",
    ("llm/run_folder/atomic_files.py", "item"): "scalars of NumPy and torch, of which neither is imported there",
    ("llm/callbacks/wandb_logger.py", "offline"): "a run object of W&B, whose versions differ",
    ("llm/callbacks/wandb_logger.py", "model_fields"): "the settings of W&B, whose versions differ",
    ("llm/callbacks/progress.py", "closed"): "a stream of somebody else's logging handler",
    ("llm/callbacks/progress.py", "isatty"): "a stream of somebody else's logging handler",
    ("llm/distributed/zero/weights.py", "ds_shape"): "a parameter that DeepSpeed has sharded",
    ("llm/distributed/zero/layouts.py", "fp32_partitioned_groups_flat"): "DeepSpeed's optimizer of stage 3",
    ("llm/distributed/zero/layouts.py", "single_partition_of_fp32_groups"): "DeepSpeed's optimizer of stages 1 and 2",
    ("llm/distributed/zero/sharded_gradients.py", "check_grad_overflow"): "DeepSpeed's optimizer of stages 1 and 2",
    ("llm/distributed/zero/sharded_gradients.py", "scaled_global_norm"): "DeepSpeed's optimizer of stages 1 and 2",
    ("llm/distributed/zero/sharded_gradients.py", "cpu_offload"): "DeepSpeed's optimizer of stages 1 and 2",
    ("llm/distributed/zero/sharded_gradients.py", "offload_optimizer"): "DeepSpeed's optimizer of stage 3",
    ("llm/distributed/zero/sharded_gradients.py", "_wait_for_offload_copies"): "DeepSpeed's optimizer of stage 3",
    ("llm/scaling/derivation.py", "__name__"): "any callable that a configuration names",
    ("llm/commands/multirun.py", "sched_getaffinity"): "a function that macOS lacks",
    ("data/pool.py", "sched_getaffinity"): "a function that macOS lacks",
}
"""Attributes that are asked for by name, and the foreign object that may lack them."""


class Tokenizer:
    """The part of a tokenizer that a LightningModule reads."""

    token_bytes, bos_id = (1,) * 300, 256


def run_pieces(composed, tiny, folder, *settings):
    """Yield the pieces of a run: data, module, optimizer, callbacks, trainer factory and strategy."""
    checked = check(composed(*tiny, *settings))
    data, model = build_data(checked.tree, checked.sizes), build_model(checked.tree, 300)
    module = build_module(checked, model, Tokenizer())
    optimizer = module.configure_optimizers()["optimizer"]
    yield from (data, module, optimizer, type(optimizer))
    yield from (module.objective, module.objective.decode(model, [[0]], max_new_tokens=1, steps=None, **GREEDY))
    yield KeyedNoise(0, 0, torch.arange(1))
    trainer = build_run_trainer(checked, RunFolder(folder), DEFAULT)
    yield from (trainer.strategy, *trainer.callbacks)


@pytest.fixture(scope="module")
def pieces(composed, tiny, tmp_path_factory):
    """Everything that the options of conf/ build, as far as it may have capabilities."""
    from llm.distributed.deepspeed_trainer import deepspeed_trainer

    folder, found = tmp_path_factory.mktemp("run"), [deepspeed_trainer]
    for settings in MODELS:
        model = build_model(composed(*tiny, *settings), 300)
        found += [*model.modules(), *model.new_caches(batch=1, max_length=4, dtype=torch.float32)]
    for name in options("optimizer"):
        found += run_pieces(composed, tiny, folder, f"optimizer={name}", "averaging=ema")
    found += run_pieces(composed, tiny, folder, "callbacks=noise_scale", "micro_batch_size=2")
    kept = [t for t in tiny if not t.startswith("trainer")]
    found += run_pieces(composed, kept, folder, "trainer=deepspeed", "trainer.accelerator=cpu", "trainer.devices=1")
    supplied = {"run_folder": RunFolder(folder), "config": {}, "name": "x", "describe": str}
    return found + build_loggers(composed(*tiny, "logger=wandb", "logger.wandb.mode=disabled"), **supplied)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_each_capability_is_implemented_by_a_piece_of_conf(pieces, name):
    assert any(isinstance(piece, PROTOCOLS[name]) for piece in pieces)


def asked_by_name(path):
    """Yield the constant names that `getattr` with a default and `hasattr` ask for in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            is_optional = node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3)
            if is_optional and isinstance(node.args[1], ast.Constant):
                yield node.args[1].value


def test_no_capability_of_a_piece_is_found_by_a_string():
    root = CONF.parent
    found = {
        (str(path.relative_to(root)), name)
        for package in ("llm", "data")
        for path in Path(root / package).rglob("*.py")
        for name in asked_by_name(path)
    }
    assert found - set(FOREIGN) == set(), "use a Protocol of llm/contracts.py"
    assert set(FOREIGN) - found == set(), "remove what is no longer asked for"
