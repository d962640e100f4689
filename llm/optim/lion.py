"""Lion: one momentum, and steps of one size."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from llm.contracts import ParamGroup
from llm.optim.base import GroupedOptimizer, gradients_of, has_rows
from llm.optim.rules import LionRule, apply_rule, apply_rule_to_shard
from llm.optim.shard import ShardLayout, rows_to_watch


class Lion(GroupedOptimizer):
    """Moves every weight by ±lr, by the sign of an interpolated momentum; half of AdamW's state.

        u = sign(β1·m + (1−β1)·g);  θ ← θ − lr·(u + λθ);  m ← β2·m + (1−β2)·g

    Start from an lr 3 to 10 times below AdamW's and a decay as much above; signs need large batches.

    Args:
        params: groups from `build_param_groups`.
        lr: peak learning rate, >= 0: how far each weight moves in a step.
        weight_decay: decoupled decay, >= 0.
        betas: β1 weighs the momentum in the update, β2 keeps it; each in [0, 1).
        skip_idle_rows: leave a token's embedding, or an expert of a stack, that had no gradient in this step where
            it is; its momentum still decays.

    Raises:
        ConfigError: a setting out of range, or groups without kinds.
        ShapeError: a matrix that a strategy has flattened.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, Algorithm 2.
    Differs: `skip_idle_rows`; as published, an unused row moves by a full ±lr for as long as its momentum is not 0.
    """

    update_family: ClassVar = "sign"

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
        """Lion, for every kind."""
        return "lion"

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Apply the rule to the whole group; stacks of experts and embeddings apart, for their rows."""
        for rows in (False, True):
            members = [p for p in params if has_rows(p, group["kind"]) == rows]
            if members:
                apply_rule(
                    self.rule,
                    members,
                    gradients_of(members),
                    self.buffers(group, members),
                    lr=float(group["lr"]),
                    weight_decay=float(group["weight_decay"]),
                    rows=rows and self.skip_idle_rows,
                )

    def update_shard(self, group: dict[str, Any], flat: Tensor, layout: ShardLayout) -> None:
        """Apply the rule to a flat shard; which rows had a gradient is agreed on by all ranks."""
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
