"""SGD with momentum, the optimizer whose batch-size rules are exact."""

from typing import Any, ClassVar

from torch import Tensor

from llm.contracts import MomentumWeights, OptimizerTraits, ParamGroup
from llm.optim import foreach
from llm.optim.checks import in_range
from llm.optim.grouped_optimizer import GroupedOptimizer, descend, gradients_of, slabs


class SGD(GroupedOptimizer):
    """Stochastic gradient descent with momentum, the reference for batch-size rules.

        m ← μ·m + g;  θ ← θ − lr·(m + λθ)

    Args:
        params: groups from `build_param_groups`.
        lr: peak learning rate, >= 0; a constant gradient g moves a weight by lr · g / (1 − μ) per step.
        weight_decay: decoupled weight decay, >= 0.
        momentum: decay rate μ of the momentum, in [0, 1).

    Raises:
        ConfigError: if a setting is out of range or a group has no kind.
        ShapeError: if a training strategy has flattened a matrix.

    Source: Polyak 1964, "Some methods of speeding up the convergence of iteration methods"; Sutskever et al. 2013, "On
        the importance of initialization and momentum in deep learning", eqs. 1 and 2, with lr outside of the momentum.
    """

    traits: ClassVar = OptimizerTraits(
        update_family="gradient", momentum_weights=lambda settings: MomentumWeights.of_average(settings["momentum"])
    )
    is_elementwise: ClassVar = True

    def __init__(self, params: list[ParamGroup], *, lr: float, weight_decay: float, momentum: float) -> None:
        self.momentum = in_range("momentum", momentum, 0.0, 1.0)
        super().__init__(params, lr=lr, weight_decay=weight_decay)

    def rule_of(self, group: dict[str, Any]) -> str:
        """Return "sgd" for every kind."""
        return "sgd"

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update the momenta, then move the parameters along them."""
        for slab in slabs(params, gradients_of(params), self.buffers(group, params)):
            momenta = slab.state["momentum"]
            foreach.mul_(momenta, self.momentum)
            foreach.add_(momenta, slab.gradients)
            descend(slab.params, momenta, lr=float(group["lr"]), weight_decay=float(group["weight_decay"]))
