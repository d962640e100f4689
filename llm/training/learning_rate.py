"""Derives the learning rate of each tensor, and sets the rates of a resumed run."""

import logging
from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from llm.contracts import ParamGroup
from llm.model.transformer import Transformer
from llm.optim.param_groups import build_param_groups, parameter_kinds
from llm.scaling.rates import RatedTensor, Rates, update_of

log = logging.getLogger(__name__)

SMALLEST_JUMP = 1e-3
"""Relative change of the learning rate below which no jump is reported."""


def rated_groups(
    model: Transformer, rates: Rates, *, optimizer: Callable[..., Any], lr: float, weight_decay: float
) -> list[ParamGroup]:
    """Return the model's tagged groups, each tensor with the rate that follows from its kind and shape."""
    named, update, pairs = dict(model.named_parameters()), update_of(optimizer), {}
    for name, kind in parameter_kinds(model).items():
        rows, columns = (1, *named[name].shape)[-2:]
        tensor = RatedTensor(name, kind, rows, columns, model.initial_stds.get(name, 0.0))
        pair = rates.rate(tensor, lr=lr, weight_decay=weight_decay, d_model=model.d_model, update=update)
        pairs[name] = tuple(pair)
    return build_param_groups(model, lr=lr, weight_decay=weight_decay, rates=pairs)


def restart_schedule(scheduler: LambdaLR, *, multiplier: Callable[[int], float], total_steps: int) -> None:
    """Give the next update the rate of this run's schedule, and report a jump from the rate that a checkpoint stored.

    A checkpoint stores the rate of its next update under the schedule of the run that saved it. Where max_steps has
    changed since then, only the updates after the next one would follow the new schedule.

    Args:
        scheduler: sets the rate after each update; its optimizer has the checkpoint's rates.
        multiplier: `f(step)`, the factor on every group's lr.
        total_steps: updates of the run.
    """
    step, groups = scheduler.last_epoch, scheduler.optimizer.param_groups
    before = [float(group["lr"]) for group in groups]
    after = [float(base) * multiplier(step) for base in scheduler.base_lrs]
    for group, rate in zip(groups, after, strict=True):
        group["lr"] = rate
    old, new = max(zip(before, after, strict=True), key=max)
    if abs(new - old) > SMALLEST_JUMP * max(old, new):
        log.warning("%s", _jump(old, new, step=step, total_steps=total_steps))


def _jump(old: float, new: float, *, step: int, total_steps: int) -> str:
    factor = f" ({new / old:.3g} times)" if old else ""
    text = (
        f"max_steps={total_steps}: the learning rate {'rises' if new > old else 'falls'} from {old:.3g} to {new:.3g}"
        f"{factor} at step {step + 1}, since the schedule of the checkpoint ended at another step"
    )
    if new < old:
        return text
    return text + (
        "; to train longer without a jump, start with schedule=wsd and resume from a checkpoint before its decay"
    )
