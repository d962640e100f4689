"""One layer of the decoder."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from llm.contracts import CAUSAL, LayerCache, Sight, SublayerOutput


class Block(nn.Module):
    """A pre-norm residual layer: x ← x + attention(norm(x)), then x ← x + ffn(norm(x)).

    Args:
        attention: built attention sublayer.
        ffn: built feed-forward sublayer.
        norm: factory, called without arguments for a new norm of the residual width.
        dropout: probability with which an element of a sublayer's output is zeroed in training.

    Source: Xiong et al., "On Layer Normalization in the Transformer Architecture", arXiv:2002.04745, figure 1b.
    """

    attention: Any  # both contracts have methods that nn.Module does not declare
    ffn: Any

    def __init__(self, *, attention: nn.Module, ffn: nn.Module, norm: Callable[[], nn.Module], dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.attention = norm(), attention
        self.ffn_norm, self.ffn = norm(), ffn
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "batch time d_model"],
        *,
        positions: Int[Tensor, "batch time"],
        document_ids: Int[Tensor, "batch time"] | None,
        cache: LayerCache | None = None,
        sight: Sight = CAUSAL,
    ) -> SublayerOutput:
        mixed = self.attention(
            self.attention_norm(x), positions=positions, document_ids=document_ids, cache=cache, sight=sight
        )
        x = x + self.dropout(mixed.hidden)
        fed = self.ffn(self.ffn_norm(x))
        return SublayerOutput(
            hidden=x + self.dropout(fed.hidden),
            losses=mixed.losses | fed.losses,
            metrics=mixed.metrics | fed.metrics,
        )

    def flops_per_token(self, context_length: int, sight: Sight = CAUSAL) -> float:
        """Return forward FLOPs per clean token."""
        copies = 2 if sight.kind == "block_pair" else 1
        return self.attention.flops_per_token(context_length, sight) + copies * self.ffn.flops_per_token(context_length)
