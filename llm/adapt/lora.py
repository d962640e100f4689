"""Low-rank adaptation of a frozen decoder, by the library peft."""

import importlib.util
from collections.abc import Sequence
from typing import Any

from llm.errors import ConfigError
from llm.model.added_inputs import ADDED
from llm.model.factored import matrix_names
from llm.model.transformer import Transformer

ADAPTER = ".lora_"
"""Part of the names that peft gives to the parameters it adds."""


def lora(model: Transformer, *, rank: int, alpha: float, dropout: float, projections: Sequence[str]) -> Transformer:
    """Freeze a decoder and add low-rank matrices to its projections: W x + (alpha / rank) B A x, B = 0 at the start.

    Args:
        model: the decoder, changed in place.
        rank: rank of each addition, at least 1.
        alpha: factor of the additions, divided by rank.
        dropout: probability with which an element of an addition's input is zeroed in training, in [0, 1).
        projections: names of projections of any layer.

    Raises:
        ConfigError: a setting is out of its range, a projection is missing, or peft is not installed.

    Source: Hu et al., "LoRA", arXiv:2106.09685, section 4.1.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("adapt=lora: peft is not installed; pip install '.[adapt]', or use adapt=ladder")
    if rank < 1:
        raise ConfigError(f"adapt.rank={rank}: must be at least 1; 8 is usual")
    if not 0 <= dropout < 1:
        raise ConfigError(f"adapt.dropout={dropout}: must lie in [0, 1); set 0 to disable it")
    known = matrix_names(model)
    if missing := [name for name in projections if name not in known] or ([] if projections else ["[]"]):
        raise ConfigError(f"adapt.projections={missing[0]}: no such projection; use some of {', '.join(sorted(known))}")
    import peft

    model.requires_grad_(False)
    names = [name for name in model.state_dict() if not name.startswith(ADDED)]
    settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "bias": "none"}
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=list(projections), **settings), model)
    renamed = {name.replace(".base_layer.", "."): name for name in model.state_dict() if ADAPTER not in name}
    model.frozen_names = frozenset(renamed[name] for name in names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(ADAPTER in name or name.startswith(ADDED))
    return model


def merge_additions(model: Transformer) -> None:
    """Add low-rank additions to the weights that they belong to, in place, and remove them; do nothing without any."""
    if not any(ADAPTER in name for name in model.state_dict()):
        return
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, module.get_base_layer())
    model.frozen_names = frozenset()
