"""How an optimizer of the project steps flat shards: the part of its base that several ranks need."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from llm.errors import ConfigError, ShapeError
from llm.optim.shard import ShardLayout


class ShardSteps:
    """Holds the layouts of an optimizer's flat shards, and hands each shard to `update_shard`."""

    _layouts: dict[int, ShardLayout]
    is_elementwise: ClassVar[bool] = False
    """Whether `update` looks at each element alone, so that it may be given a flat shard as it is."""
    owned_state: dict[str, dict[str, Tensor]]
    """State of whole tensors, on the rank that works on them."""

    def attach_layouts(self, layouts: Sequence[ShardLayout]) -> None:
        """Say what the flat shards in the groups hold, once a strategy has put them there; its steps read them."""
        self._layouts = {id(layout.flat): layout for layout in layouts}
        self.owned_state = {}

    @property
    def is_sharded(self) -> bool:
        """Whether layouts were attached."""
        return bool(getattr(self, "_layouts", None))

    def layout_of(self, flat: Tensor) -> ShardLayout:
        """Return the layout of a shard.

        Raises:
            ShapeError: it has none.
        """
        layout = self._layouts.get(id(flat))
        if layout is None:
            raise ShapeError(
                f"optimizer={type(self).__name__}: a flat shard of {flat.numel()} elements came without a layout; call "
                "attach_layouts() after the strategy has wrapped the optimizer"
            )
        return layout

    def step_shards(self, group: dict[str, Any]) -> None:
        """Update the shards in one group; a group may have none for now."""
        for flat in group["params"]:
            if flat.grad is not None:
                self.update_shard(group, flat, self.layout_of(flat))

    def update_shard(self, group: dict[str, Any], flat: Tensor, layout: ShardLayout) -> None:
        """Update a flat shard, as `update` would update the whole tensors; called by all ranks together."""
        if self.is_elementwise:
            self.update(group, [flat])
            return
        raise ConfigError(
            f"optimizer={type(self).__name__}: has no `update_shard`, so it cannot step tensors that are cut up; use "
            "trainer=ddp or trainer.stage=0"
        )

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update whole tensors."""
        raise NotImplementedError

    def load_owned_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take over the state of whole tensors, by name."""
        self.owned_state = state


def keep_inactive(param: Tensor, active: Tensor | None, apply: Callable[[], None]) -> None:
    """Run `apply`, which moves `param`, and put the elements that are not active back where they were."""
    if active is None:
        apply()
        return
    before = param.clone()
    apply()
    param.copy_(torch.where(active, param, before))
