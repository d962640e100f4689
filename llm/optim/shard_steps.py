"""Updates of flat shards: the part of the optimizer's base class that is used when ranks share the tensors."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from llm.errors import ConfigError, ShapeError
from llm.optim.shard import ShardLayout


class ShardSteps:
    """A base class that stores the layouts of an optimizer's flat shards and calls `update_shard` for each shard."""

    _layouts: dict[int, ShardLayout]
    is_elementwise: ClassVar[bool] = False
    """Whether `update` treats each element separately, so that it can be applied to a flat shard."""
    owned_state: dict[str, dict[str, Tensor]]
    """State of whole tensors by tensor name and state name, stored on the rank that owns them."""

    def attach_layouts(self, layouts: Sequence[ShardLayout]) -> None:
        """Store the layouts of the flat shards; call this after the strategy has put the shards into the groups."""
        self._layouts = {id(layout.flat): layout for layout in layouts}
        self.owned_state = {}

    @property
    def is_sharded(self) -> bool:
        """Whether layouts have been attached, so that the groups contain flat shards."""
        return bool(getattr(self, "_layouts", None))

    def layout_of(self, flat: Tensor) -> ShardLayout:
        """Return the layout of a shard.

        Raises:
            ShapeError: if it has none.
        """
        layout = self._layouts.get(id(flat))
        if layout is None:
            raise ShapeError(
                f"optimizer={type(self).__name__}: a flat shard of {flat.numel()} elements came without a layout; call "
                "attach_layouts() after the strategy has wrapped the optimizer"
            )
        return layout

    def step_shards(self, group: dict[str, Any]) -> None:
        """Update the shards of one group that have a gradient; there may be none."""
        for flat in group["params"]:
            if flat.grad is not None:
                self.update_shard(group, flat, self.layout_of(flat))

    def update_shard(self, group: dict[str, Any], flat: Tensor, layout: ShardLayout) -> None:
        """Update a flat shard as `update` would update the whole tensors; all ranks must call this together."""
        if self.is_elementwise:
            self.update(group, [flat])
            return
        raise ConfigError(
            f"optimizer={type(self).__name__}: has no `update_shard`, so it cannot step sharded tensors; use "
            "trainer=ddp or trainer.stage=0"
        )

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update whole tensors."""
        raise NotImplementedError

    def load_owned_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restore the state of whole tensors, by tensor name."""
        self.owned_state = state


def keep_inactive(param: Tensor, active: Tensor | None, apply: Callable[[], None]) -> None:
    """Run `apply`, which changes `param`, and restore the elements that are not active."""
    if active is None:
        apply()
        return
    before = param.clone()
    apply()
    param.copy_(torch.where(active, param, before))
