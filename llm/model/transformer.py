"""The decoder-only Transformer: embedding, layers, final norm, head."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm.contracts import AttentionGeometry, LayerCache
from llm.errors import ConfigError
from llm.model.block import Block
from llm.ops.products import is_read_only, read_only_product


class TransformerOutput(NamedTuple):
    """The last hidden states, and what the sublayers returned beside theirs, named `layer<i>/<name>`."""

    hidden: Float[Tensor, "batch time d_model"]
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]


class Head(nn.Linear):
    """The projection from hidden states to vocabulary scores."""

    parameter_kinds: ClassVar = {"weight": "head"}


class Transformer(nn.Module):
    """Composes a decoder from factories, handing each the dimensions it needs.

    Args:
        vocab_size: tokens in the vocabulary.
        d_model: width of the residual stream.
        num_layers: number of blocks.
        num_heads: query heads.
        num_kv_heads: key/value heads, or None for num_heads.
        head_dim: size of a head, or None for d_model / num_heads.
        tie_embeddings: whether the head is the embedding's own matrix (arXiv:1608.05859).
        dropout: of each sublayer's output, in [0, 1).
        activation_checkpointing: recompute blocks in the backward pass instead of keeping their activations: true for
            all, N >= 1 for every N-th, false for none.
        attention: factory, called once a layer with the attention contract's arguments.
        ffn: factory, called once a layer with d_model.
        norm: factory, called with dim.
        position: factory, called once with head_dim.
        init: called once as `init(model, num_layers=…)`; returns the standard deviation of each matrix by name.
        first_ffn: factory of the feed-forward of the first layers, where they differ from the rest.
        first_ffn_layers: how many first layers use it, in [0, num_layers].

    Raises:
        ConfigError: dimensions that do not fit one another.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        tie_embeddings: bool,
        dropout: float,
        activation_checkpointing: bool | int,
        attention: Callable[..., nn.Module],
        ffn: Callable[..., nn.Module],
        norm: Callable[..., nn.Module],
        position: Callable[..., nn.Module],
        init: Callable[..., dict[str, float]],
        first_ffn: Callable[..., nn.Module] | None = None,
        first_ffn_layers: int = 0,
    ) -> None:
        super().__init__()
        head_dim = resolve_head_dim(d_model=d_model, num_heads=num_heads, head_dim=head_dim)
        check_geometry(vocab_size=vocab_size, d_model=d_model, num_layers=num_layers, dropout=dropout)
        if activation_checkpointing < 0:
            raise ConfigError(
                f"model.activation_checkpointing={activation_checkpointing}: must be true, false, or N above 0 to "
                "recompute every N-th block; try 2"
            )
        self.vocab_size, self.d_model, self.recompute_every = vocab_size, d_model, int(activation_checkpointing)
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position = position(head_dim=head_dim)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        geometry = AttentionGeometry(d_model=d_model, num_heads=num_heads, num_kv_heads=kv_heads, head_dim=head_dim)
        build_attention = partial(attention, geometry=geometry, position=self.position)
        build_norm = partial(norm, dim=d_model)
        ffns = choose_ffns(ffn, first_ffn, first_ffn_layers=first_ffn_layers, num_layers=num_layers)
        self.layers = nn.ModuleList(
            Block(
                attention=build_attention(layer_index=i), ffn=build(d_model=d_model), norm=build_norm, dropout=dropout
            )
            for i, build in enumerate(ffns)
        )
        self.final_norm = build_norm()
        self.lm_head = Head(d_model, vocab_size, bias=False)
        if tie_embeddings:
            self.lm_head.weight = self.token_embedding.weight
        self.initial_stds = init(self, num_layers=num_layers)

    def blocks(self) -> list[Block]:
        """The layers, in order."""
        return [cast(Block, layer) for layer in self.layers]

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        *,
        positions: Int[Tensor, "batch time"],
        document_ids: Int[Tensor, "batch time"] | None = None,
        caches: Sequence[LayerCache] | None = None,
    ) -> TransformerOutput:
        """Return hidden states after the final norm; `logits` turns them into scores.

        Without `document_ids` each row is one document. With `caches`, input_ids are the tokens that follow.
        """
        x = self.token_embedding(input_ids)
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            cache = None if caches is None else caches[i]
            run = partial(layer, positions=positions, document_ids=document_ids, cache=cache)
            is_recomputed = self.recompute_every and i % self.recompute_every == 0
            if is_recomputed and self.training and cache is None:
                out = checkpoint(run, x, use_reentrant=False)
            else:
                out = run(x)
            x = out.hidden
            losses |= {f"layer{i}/{name}": value for name, value in out.losses.items()}
            metrics |= {f"layer{i}/{name}": value for name, value in out.metrics.items()}
        return TransformerOutput(hidden=self.final_norm(x), losses=losses, metrics=metrics)

    def logits(self, hidden: Float[Tensor, "batch time d_model"]) -> Float[Tensor, "batch time vocab"]:
        """Vocabulary scores of hidden states."""
        weight = self.lm_head.weight
        is_plain = torch.is_autocast_enabled(hidden.device.type)
        if is_plain or not is_read_only(hidden, weight, hidden.numel() * self.vocab_size):
            return self.lm_head(hidden)
        return read_only_product(hidden, weight)

    def new_caches(self, *, batch: int, max_length: int, dtype: torch.dtype) -> list[LayerCache]:
        """Empty caches, one a layer, for decoding up to max_length tokens."""
        device = self.token_embedding.weight.device
        return [
            layer.attention.new_cache(batch=batch, max_length=max_length, device=device, dtype=dtype)
            for layer in self.blocks()
        ]

    def reach(self, train_length: int) -> float:
        """Return the tokens of context that every layer can use after training on windows of train_length."""
        return min(layer.attention.position.reach(train_length) for layer in self.blocks())

    def cautions(self, *, context_length: int, is_training: bool) -> list[str]:
        """Return one line per setting that cannot act as its name says in windows of context_length tokens."""
        lines = (
            line
            for layer in self.blocks()
            for line in layer.attention.cautions(context_length=context_length, is_training=is_training)
        )
        return list(dict.fromkeys(lines))

    def flops_per_token(self, context_length: int) -> float:
        """Forward FLOPs a token in a window of context_length: two for each weight used, and attention's mixing.

        Norms, activations and the embedding lookup are left out, as is usual (Kaplan et al., arXiv:2001.08361,
        table 1). Training takes three times as many.
        """
        layers = sum(layer.flops_per_token(context_length) for layer in self.blocks())
        return layers + 2.0 * self.lm_head.weight.numel()


def resolve_head_dim(*, d_model: int, num_heads: int, head_dim: int | None) -> int:
    """Return head_dim, or d_model / num_heads where it is None.

    Raises:
        ConfigError: num_heads or head_dim below 1 or, where head_dim is derived, not dividing d_model.
    """
    if num_heads < 1:
        raise ConfigError(f"model.num_heads={num_heads}: must be at least 1; try 4")
    if head_dim is not None and head_dim < 1:
        raise ConfigError(f"model.head_dim={head_dim}: must be at least 1, or null for d_model / num_heads")
    if head_dim is not None:
        return head_dim
    if d_model % num_heads:
        legal = [n for n in range(1, d_model + 1) if d_model % n == 0]
        near = sorted(sorted(legal, key=lambda n: abs(n - num_heads))[:2])
        raise ConfigError(
            f"model.num_heads={num_heads}: must divide model.d_model={d_model}; try {' or '.join(map(str, near))}"
        )
    return d_model // num_heads


def choose_ffns(
    ffn: Callable[..., nn.Module], first_ffn: Callable[..., nn.Module] | None, *, first_ffn_layers: int, num_layers: int
) -> list[Callable[..., nn.Module]]:
    """Return the feed-forward factory of each layer.

    Raises:
        ConfigError: more first layers than layers, or first layers without their factory.
    """
    if not 0 <= first_ffn_layers <= num_layers:
        raise ConfigError(
            f"model.first_ffn_layers={first_ffn_layers}: must lie in [0, model.num_layers={num_layers}]; 0 for none"
        )
    if first_ffn_layers and first_ffn is None:
        raise ConfigError(f"model.first_ffn_layers={first_ffn_layers}: model.first_ffn is missing; use model=moe")
    return [first_ffn or ffn] * first_ffn_layers + [ffn] * (num_layers - first_ffn_layers)


def check_geometry(*, vocab_size: int, d_model: int, num_layers: int, dropout: float) -> None:
    """Raise ConfigError for a dimension below 1 or a dropout outside [0, 1)."""
    for key, value in (("vocab_size", vocab_size), ("d_model", d_model), ("num_layers", num_layers)):
        if value < 1:
            raise ConfigError(f"model.{key}={value}: must be at least 1; choose a size with model/size=tiny")
    if not 0 <= dropout < 1:
        raise ConfigError(f"model.dropout={dropout}: must lie in [0, 1); 0 turns it off")
