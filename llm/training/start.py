"""Prepares a run's first state: initial weights, the micro-batch size and a measured noise scale."""

import logging
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from llm.callbacks.rng_state import get_rng_state, set_rng_state
from llm.config.build import build_objective, module_factories
from llm.config.checked import CheckedConfig
from llm.config.sizes import Sizes
from llm.contracts import Objective
from llm.distributed.launch import find_launch
from llm.distributed.rendezvous import agree, smallest
from llm.errors import ConfigError
from llm.huggingface.hf_folder import is_hf_folder
from llm.huggingface.load import load_hf_weights
from llm.huggingface.logits import check_import
from llm.model.added_inputs import with_added
from llm.model.ffn.balance.balance_rule import without_statistics
from llm.model.transformer import Transformer
from llm.ops.memory import SavedBytes
from llm.run_folder.backbone import BACKBONE, find_backbone
from llm.run_folder.checkpoint import compare_state, find_last, load_model
from llm.run_folder.checkpoint_files import list_checkpoints, read_manifest
from llm.run_folder.folder import RunFolder
from llm.scaling.noise_estimate import PROBE_REMEDY
from llm.training.grown import grown_state
from llm.training.learning_rate import rated_groups
from llm.training.micro_batch import find_micro_batch_size
from llm.training.noise_probe import PROBE_PATIENCE, PROBE_UPDATES, measure_noise_scale
from llm.training.trial import NO_TOKEN, trial_batch, trial_loss

log = logging.getLogger(__name__)


def load_initial_weights(
    checked: CheckedConfig, model: Transformer, bos_id: int, *, resumed: Path | None = None
) -> Path | None:
    """Copy the weights that `init_from` names into the model, and grow them; return their folder, None without any.

    Args:
        checked: the configuration.
        model: the decoder, before it is adapted.
        bos_id: the id of the run's tokenizer that begins a document.
        resumed: the checkpoint that the run continues from; it names the frozen weights of an adapted run.
    """
    run = checked.run
    is_frozen = bool(checked.tree.get("adapt"))
    if run.init_from is None or (resumed is not None and not is_frozen):  # the checkpoint has all weights
        return None
    source = Path(run.init_from)
    if resumed is not None:
        source = find_backbone(read_manifest(resumed) or {}, init_folders(source))
    if is_hf_folder(source):
        if checked.tree.get("grow"):
            raise ConfigError(
                f"grow: init_from={source} is a Hugging Face folder; train one update from it, and grow that run"
            )
        hf_state = load_hf_weights(source, model, context_length=run.context_length, bos_id=bos_id)
        model.load_state_dict(hf_state)
        launch = find_launch()
        if resumed is None and (launch is None or launch.rank == 0):
            check_import(source, model, context_length=run.context_length, bos_id=bos_id)
        log.info("weights from %s", source)
        return source
    folder = source if (source / "manifest.json").is_file() else find_last(source, key="init_from").path
    if BACKBONE in (read_manifest(folder) or {}):
        raise ConfigError(
            f"init_from={folder}: an adapted run stores what it added and not the frozen weights; name the run that it "
            "adapted, or export a run of adapt=lora and name that folder"
        )
    own = model.state_dict()
    if checked.tree.get("grow"):
        model.load_state_dict(grown_state(checked, folder, model_state(folder), model))
        return folder
    state = with_added(without_statistics(model_state(folder)), own)
    compare_state(state, without_statistics(own), source=f"init_from={folder}")
    model.load_state_dict(own | state)
    log.info("weights from %s", folder)
    return folder


def init_folders(source: Path) -> list[Path]:
    """Return the folders that may have the weights of `init_from`: itself, and the checkpoints of a run."""
    return [source, *(folder for _, folder in reversed(list_checkpoints(source / "checkpoints")))]


def model_state(folder: Path) -> dict[str, torch.Tensor]:
    """Return the decoder's own weights from a checkpoint folder."""
    return {name.removeprefix("model."): tensor for name, tensor in load_model(folder).items()}


def chosen_micro_batch_size(checked: CheckedConfig, model: Transformer, folder: RunFolder) -> int:
    """Return micro_batch_size; for auto the largest that fits on every rank, tried at the run's own precision."""
    if checked.run.micro_batch_size != "auto":
        return checked.run.micro_batch_size
    sizes, launch = checked.sizes, find_launch()
    context_length, device = checked.run.context_length, sizes.device
    objective = build_objective(checked.tree, vocab_size=model.vocab_size, bos_id=NO_TOKEN)
    trial = partial(trial_step, model.to(device), objective, sizes=sizes)
    candidates = sizes.micro_batch_sizes
    found = find_micro_batch_size(trial, candidates=candidates, device=device, context_length=context_length)
    return found if launch is None else smallest(found, launch, about=f"micro_batch_size of {folder.path}")


def measured_scaling(checked: CheckedConfig, model: Transformer, data: Any, folder: RunFolder) -> dict[str, Any]:
    """Return the node of the scaling rule, with the noise scale of a probe where one has to be measured.

    On several ranks the first one measures and the others wait for its result.
    """
    node, launch = dict(checked.tree["scaling"]), find_launch()
    if not checked.sizes.needs_probe:
        return node
    try:
        found = probe_noise_scale(checked, model, data) if launch is None or launch.rank == 0 else ""
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


def probe_noise_scale(checked: CheckedConfig, model: Transformer, data: Any) -> str:
    """Return the noise scale in tokens, to three digits, from a probe on this process's device."""
    sizes, context_length = checked.sizes, checked.run.context_length
    base = checked.tree["scaling"]["base_batch_tokens"]
    factories, total = module_factories(checked.tree, sizes.ramp), max(sizes.total_steps, PROBE_UPDATES)
    device = torch.device(sizes.accelerator)
    dataset = data.windows("train")
    enough = -(-PROBE_UPDATES * base // sizes.ramp.batch_tokens_at(0))
    groups = partial(rated_groups, **{key: factories[key] for key in ("rates", "optimizer", "lr", "weight_decay")})
    windows = measure_noise_scale(
        model.to(device),
        objective=build_objective(checked.tree, vocab_size=model.vocab_size, bos_id=data.tokenizer.bos_id),
        seed=checked.run.seed,
        windows=chain.from_iterable(data.train_sampler(total_steps=enough)),
        read=lambda part: {name: tensor.to(device) for name, tensor in dataset.__getitems__(part).items()},  # type: ignore
        windows_per_update=base // context_length,
        micro_batch_size=data.micro_batch_size,
        build_optimizer=lambda probe: factories["optimizer"](groups(probe)),
        lr_factor=lambda step: factories["schedule"](step, total_steps=total),
        clip=checked.tree["trainer"].get("gradient_clip_val"),
        autocast=sizes.autocast,
    )
    return f"{windows * context_length:.3g}"


def trial_step(model: Transformer, objective: Objective, windows: int, *, sizes: Sizes) -> int:
    """Run forward and backward on `windows` windows of zeros; return the bytes kept for the backward pass."""
    batch = trial_batch(windows, sizes.plan.context_length, next(model.parameters()).device)
    random_state = get_rng_state()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # a codebook would learn from zeros
    with sizes.autocast(), SavedBytes(model) as saved:
        loss = trial_loss(model, objective, batch)
    loss.backward()
    model.zero_grad(set_to_none=True)
    model.load_state_dict(buffers, strict=False)
    set_rng_state(random_state)
    return saved.total
