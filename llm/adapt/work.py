"""Counts the work of an update where a part of the weights is frozen."""

from llm.adapt.ladder import LadderTransformer
from llm.contracts import PartiallyActive, Sight
from llm.model.transformer import Transformer
from llm.ops.flops import FORWARD_AND_BACKWARD


def training_factor(model: Transformer, context_length: int, sight: Sight) -> float:
    """Return the FLOPs of a training step per FLOP of its forward pass.

    A trained weight is used three times: forward, for the gradient of its input, and for its own. A frozen weight lacks
    the last. A decoder without a graph is used once.
    """
    total = model.flops_per_token(context_length, sight)
    copies = 2 if sight.kind == "block_pair" else 1
    saved = 0.0
    if isinstance(model, LadderTransformer):
        saved += (FORWARD_AND_BACKWARD - 1) * model.frozen_flops_per_token(context_length, sight)
        saved += 0.0 if model.head().weight.requires_grad else 2.0 * model.head().weight.numel()
        return FORWARD_AND_BACKWARD - saved / total
    if all(parameter.requires_grad for parameter in model.parameters()):
        return float(FORWARD_AND_BACKWARD)
    for block in model.blocks():
        for module in block.modules():
            share = module.active_fraction if isinstance(module, PartiallyActive) else 1.0
            frozen = [p for p in module.parameters(recurse=False) if p.ndim >= 2 and not p.requires_grad]
            saved += 2.0 * copies * share * sum(p.numel() for p in frozen)
    saved += 0.0 if model.lm_head.weight.requires_grad else 2.0 * model.lm_head.weight.numel()
    return FORWARD_AND_BACKWARD - saved / total
