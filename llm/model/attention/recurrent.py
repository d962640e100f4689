"""The base class of attentions that store running states instead of keys: linear, delta and Performer."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.contracts import CAUSAL, Sight
from llm.errors import ConfigError
from llm.model.attention.attention_layer import Attention
from llm.model.attention.short_convolution import ShortConvolution, Tail, TokenGate, check_taps
from llm.model.attention.states import StateCache
from llm.model.position.position_module import Position


class RecurrentAttention(Attention):
    """An attention that reads a sequence chunk by chunk, each from the states after the previous chunk.

    Training starts from empty states, and decoding continues from the cache. Both run outside autocast, because sums
    over a whole document need more bits than bf16 has.
    """

    conv: ShortConvolution | None
    """The short convolution after the projections, or None; every kind calls `add_convolution`."""

    option: ClassVar[str]
    """Name of the option in conf/model/attention, for error messages."""

    @abstractmethod
    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, ids: Tensor, cache: StateCache, **gates: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mixed values and the states after the last token; shapes as in `attend`, `ids` of documents."""

    def add_convolution(self, conv: int) -> None:
        """Add a short convolution of `conv` taps after the projections; 0 for none."""
        channels = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.conv = ShortConvolution(channels=channels, taps=conv) if check_taps(conv) else None

    def project(
        self,
        x: Float[Tensor, "batch time d_model"],
        *,
        document_ids: Int[Tensor, "batch time"] | None = None,
        cache: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project as in `Attention`, through the short convolution where there is one."""
        if self.conv is None:
            return super().project(x)
        assert self.v_proj is not None, "recurrent kinds have values of their own"
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        batch, time = x.shape[:2]
        ids = torch.zeros(batch, time, dtype=torch.long, device=x.device) if document_ids is None else document_ids
        joined = torch.cat(parts, dim=-1)
        tail = None if cache is None else cache.tail
        if tail is None:
            tail = self.empty_tail(batch=batch, device=x.device, dtype=joined.dtype)
        out, tail = self.conv(joined, ids, tail)
        if cache is not None:
            cache.tail = tail
        return self.to_heads(*out.split([part.shape[-1] for part in parts], dim=-1))

    def empty_tail(self, *, batch: int, device: torch.device, dtype: torch.dtype) -> Tail | None:
        """Return the convolution's tail before a text, or None without a convolution."""
        if self.conv is None:
            return None
        before, channels = self.conv.num_taps - 1, self.conv.channels
        return Tail.empty(batch=batch, before=before, channels=channels, device=device, dtype=dtype)

    def flops_per_token(self, context_length: int, sight: Sight = CAUSAL) -> float:
        """Add the taps to the count of `Attention`; gates add two per weight."""
        taps = 0.0 if self.conv is None else 2.0 * self.conv.num_taps * self.conv.channels
        gates = sum(2.0 * module.weight.numel() for module in self.modules() if isinstance(module, TokenGate))
        return super().flops_per_token(context_length, sight) + taps + gates

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
        **gates: Tensor,
    ) -> tuple[Float[Tensor, "batch time heads head_dim"], dict[str, Tensor], dict[str, Tensor]]:
        """Mix values chunk by chunk, starting from the states of the cache if one is given."""
        ids = torch.zeros_like(positions) if document_ids is None else document_ids
        cache = self.new_cache(batch=len(v), max_length=0, device=v.device, dtype=v.dtype) if cache is None else cache
        with torch.autocast(v.device.type, enabled=False):
            mixed, states = self.mix(q, k, v, positions, ids, cache, **gates)
        cache.update(states, ids)
        return mixed.to(v.dtype), {}, {}
