"""Update rules that optimizers apply to slabs: Lion, and AdamW for tensors that Muon does not orthogonalise."""

from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor
from torch.optim.adamw import adamw

from llm.errors import ConfigError
from llm.optim import foreach
from llm.optim.checks import check_betas, in_range, one_of
from llm.optim.grouped_optimizer import Slab, between, descend, slabs
from llm.optim.idle_rows import keep_idle_rows
from llm.optim.shard_steps import keep_inactive


@runtime_checkable
class Rule(Protocol):
    """An update rule: the state of each element, and the update of a slab."""

    name: ClassVar[str]
    buffers: ClassVar[tuple[str, ...]]

    def update(self, slab: Slab, *, lr: float, weight_decay: float) -> None:
        """Update `slab.params` and its state."""
        ...


class LionRule:
    """The rule of Lion, which moves weights by the sign of an interpolated momentum.

        u = sign(β1·m + (1−β1)·g);  θ ← θ − lr·(u + λθ);  m ← β2·m + (1−β2)·g

    Args:
        betas: β1 weights the momentum in the update, β2 is the momentum's decay rate; each in [0, 1).

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, Algorithm 2.
    """

    name: ClassVar[str] = "lion"
    buffers: ClassVar[tuple[str, ...]] = ("momentum",)

    def __init__(self, *, betas: Sequence[float]) -> None:
        self.betas = check_betas("betas", betas)

    def update(self, slab: Slab, *, lr: float, weight_decay: float) -> None:
        """Update `slab.params` and its momentum."""
        beta1, beta2 = self.betas
        momenta = slab.state["momentum"]
        directions = between(momenta, slab.gradients, 1 - beta1, out=slab.scratch)
        foreach.lerp_(momenta, slab.gradients, 1 - beta2)
        foreach.sign_(directions)
        descend(slab.params, directions, lr=lr, weight_decay=weight_decay)


class AdamWRule:
    """The rule of AdamW, computed by torch's fused kernel: θ ← θ − lr·(m̂/(√v̂ + eps) + λθ).

    Args:
        betas: decay rates of the first and the second moment, each in [0, 1).
        eps: constant added to √v̂, > 0.

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101, Algorithm 2.
    """

    name: ClassVar[str] = "adamw"
    buffers: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __init__(self, *, betas: Sequence[float], eps: float) -> None:
        self.betas, self.eps = check_betas("betas", betas), in_range("eps", eps, 1e-30, 1.0)

    def update(self, slab: Slab, *, lr: float, weight_decay: float) -> None:
        """Update `slab.params` and its moments; `slab.state["step"]` counts from 1."""
        exact = [parameter.float() for parameter in slab.params]  # the same tensors, where they are fp32 already
        adamw(
            exact,
            slab.gradients,
            slab.state["exp_avg"],
            slab.state["exp_avg_sq"],
            [],
            list(foreach.sub(slab.state["step"], 1.0)),  # torch's function adds 1 to the step counter
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
        )
        for parameter, updated in zip(slab.params, exact, strict=True):
            if updated is not parameter:
                parameter.copy_(updated)


RULES: dict[str, type[LionRule] | type[AdamWRule]] = {"lion": LionRule, "adamw": AdamWRule}


def make_rule(key: str, name: str, *, betas: Sequence[float], eps: float | None) -> Rule:
    """Return the rule called `name`; only AdamW has an `eps`.

    Raises:
        ConfigError: if the name is unknown, AdamW has no eps, or Lion has one, which it would ignore.
    """
    if one_of(key, name, RULES) == "lion":
        if eps is not None:
            raise ConfigError(f"optimizer.{key}_eps={eps}: Lion has no eps; set optimizer.{key}_eps=null")
        return LionRule(betas=betas)
    if eps is None:
        raise ConfigError(f"optimizer.{key}_eps=null: AdamW needs one; set optimizer.{key}_eps=1e-8")
    return AdamWRule(betas=betas, eps=eps)


def apply_rule(
    rule: Rule,
    params: list[Tensor],
    gradients: list[Tensor],
    state: dict[str, list[Tensor]],
    *,
    lr: float,
    weight_decay: float,
    axes: tuple[int, ...] | None,
) -> None:
    """Run `rule` over whole tensors, slab by slab; with `axes`, rows along them without a gradient are not changed."""
    for slab in slabs(params, gradients, state):
        if axes is not None:
            keep_idle_rows(slab, lambda slab=slab: rule.update(slab, lr=lr, weight_decay=weight_decay), axes)
        else:
            rule.update(slab, lr=lr, weight_decay=weight_decay)


def apply_rule_to_shard(
    rule: Rule,
    flat: Tensor,
    gradient: Tensor,
    state: dict[str, list[Tensor]],
    *,
    lr: float,
    weight_decay: float,
    active: Tensor | None,
) -> None:
    """Run `rule` over a flat shard; elements that are not `active` are not changed, but their state is."""
    held = state if active is None else state | {"active": [active]}
    for slab in slabs([flat], [gradient], held):
        mask = None if active is None else slab.state["active"][0]
        keep_inactive(slab.params[0], mask, lambda slab=slab: rule.update(slab, lr=lr, weight_decay=weight_decay))
