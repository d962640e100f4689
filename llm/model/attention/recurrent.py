"""The base class of attentions that store running states instead of keys: linear and Performer."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.contracts import CAUSAL, Sight
from llm.errors import ConfigError
from llm.model.attention.attention_layer import Attention
from llm.model.attention.states import StateCache
from llm.model.position.position_module import Position


class RecurrentAttention(Attention):
    """An attention that reads a sequence chunk by chunk, each from the states after the previous chunk.

    Training starts from empty states, and decoding continues from the cache. Both run outside autocast, because sums
    over a whole document need more bits than bf16 has.
    """

    option: ClassVar[str]
    """Name of the option in conf/model/attention, for error messages."""

    @abstractmethod
    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, ids: Tensor, cache: StateCache
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mixed values and the states after the last token; shapes as in `attend`, `ids` of documents."""

    def check_position(self, position: Position) -> None:
        """Accept positions with one view that turn no values."""
        if position.turns_values:
            raise ConfigError(
                f"model.position.turn_values=true: model.attention={self.option} sums values in a state, and its "
                "output is not turned back; set model.position.turn_values=false, or use model/attention=softmax"
            )
        if position.far_from is not None:
            raise ConfigError(
                f"model.position={type(position).__name__}: it scores far pairs one by one, which "
                f"model.attention={self.option} never does; use model/position=rope, or model/attention=softmax"
            )

    def attend(
        self,
        q: Float[Tensor, "batch time heads head_dim"],
        k: Float[Tensor, "batch time kv_heads head_dim"],
        v: Float[Tensor, "batch time kv_heads head_dim"],
        *,
        positions: Int[Tensor, "batch time"],
        document_ids: Int[Tensor, "batch time"] | None,
        cache: Any,
        sight: Sight = CAUSAL,
    ) -> tuple[Float[Tensor, "batch time heads head_dim"], dict[str, Tensor], dict[str, Tensor]]:
        """Mix values chunk by chunk, starting from the states of the cache if one is given."""
        ids = torch.zeros_like(positions) if document_ids is None else document_ids
        cache = self.new_cache(batch=len(v), max_length=0, device=v.device, dtype=v.dtype) if cache is None else cache
        with torch.autocast(v.device.type, enabled=False):
            mixed, states = self.mix(q, k, v, positions, ids, cache)
        cache.update(states, ids)
        return mixed.to(v.dtype), {}, {}
