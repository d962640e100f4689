"""Lion: an optimizer that moves weights by the sign of an interpolated momentum."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from llm.contracts import MomentumWeights, OptimizerTraits, ParamGroup
from llm.optim.grouped_optimizer import GroupedOptimizer, gradients_of
from llm.optim.idle_rows import row_axes
from llm.optim.shard import ShardLayout, rows_to_watch
from llm.optim.update_rules import LionRule, apply_rule, apply_rule_to_shard


class Lion(GroupedOptimizer):
    """An optimizer that moves every weight by ±lr, the sign of an interpolated momentum, with half of AdamW's state.

        u = sign(β1·m + (1−β1)·g);  θ ← θ − lr·(u + λθ);  m ← β2·m + (1−β2)·g

    Start with an lr 3 to 10 times smaller than AdamW's and a weight decay larger by the same factor. Sign updates need
    large batches.

    Args:
        params: groups from `build_param_groups`.
        lr: peak learning rate, >= 0: the distance that each weight moves per step.
        weight_decay: decoupled weight decay, >= 0.
        betas: β1 weights the momentum in the update, β2 is the momentum's decay rate; each in [0, 1).
        skip_idle_rows: do not update a token's embedding, or an expert of a stack, that has no gradient in this step;
            its momentum still decays.

    Raises:
        ConfigError: if a setting is out of range or a group has no kind.
        ShapeError: if a training strategy has flattened a matrix.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, Algorithm 2.
    Differs: `skip_idle_rows` is added; in the published rule an unused row moves by ±lr while its momentum is not 0.
    """

    traits: ClassVar = OptimizerTraits(update_family="sign", momentum_weights=lambda settings: _weights(settings))

    def __init__(
        self,
        params: list[ParamGroup],
        *,
        lr: float,
        weight_decay: float,
        betas: Sequence[float],
        skip_idle_rows: bool,
    ) -> None:
        self.rule, self.skip_idle_rows = LionRule(betas=betas), skip_idle_rows
        super().__init__(params, lr=lr, weight_decay=weight_decay)

    def rule_of(self, group: dict[str, Any]) -> str:
        """Return "lion" for every kind."""
        return "lion"

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Apply the rule to the group; update stacks of experts and embeddings separately, for idle rows."""
        for axes in (None, (-1,), (1, 2)):
            members = [p for p in params if row_axes(p, group["kind"]) == axes]
            if members:
                apply_rule(
                    self.rule,
                    members,
                    gradients_of(members),
                    self.buffers(group, members),
                    lr=float(group["lr"]),
                    weight_decay=float(group["weight_decay"]),
                    axes=axes if self.skip_idle_rows else None,
                )

    def update_shard(self, group: dict[str, Any], flat: Tensor, layout: ShardLayout) -> None:
        """Apply the rule to a flat shard; the ranks combine their flags of rows that have a gradient."""
        gradient = gradients_of([flat])[0]
        rows = rows_to_watch(layout, group["kind"]) if self.skip_idle_rows else {}
        apply_rule_to_shard(
            self.rule,
            flat,
            gradient,
            self.buffers(group, [flat]),
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            active=layout.active_elements(gradient, rows) if rows else None,
        )


def _weights(settings: Mapping[str, Any]) -> MomentumWeights:
    """Return the weights of past gradients in β1·m + (1−β1)·g, where m decays by β2."""
    beta1, beta2 = settings["betas"]
    return MomentumWeights(1 - beta1, beta1 * (1 - beta2), beta2)
