"""The decoder-only Transformer: embedding, layers, final norm and head."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm.contracts import CAUSAL, AttentionGeometry, LayerCache, Sight
from llm.model.added_inputs import build_extra_embedding, build_time_embedding, look_up
from llm.model.block import Block
from llm.model.decoder_checks import check_decoder, choose_ffns, resolve_head_dim
from llm.model.depth_attention import Depth, as_source, choose_block, final_query
from llm.model.factored import factor_projections
from llm.ops.head_loss import Rule, head_loss
from llm.ops.loss import Reduction, linear_cross_entropy
from llm.ops.products import is_read_only, read_only_product


class TransformerOutput(NamedTuple):
    """The last hidden states, with losses and metrics of the sublayers under the names `layer<i>/<name>`."""

    hidden: Float[Tensor, "batch time d_model"]
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]


class Head(nn.Linear):
    """The projection from hidden states to vocabulary scores.

    Scores and losses are both computed in its forward: ZeRO stage 3 gathers its weight for that call alone.
    """

    parameter_kinds: ClassVar = {"weight": "head"}

    def forward(
        self,
        input: Float[Tensor, "batch time d_model"],
        labels: Int[Tensor, "batch time"] | None = None,
        reduction: Reduction = "mean",
        weights: Float[Tensor, "batch time"] | None = None,
        rule: Rule | None = None,
        per_token: Sequence[Tensor] = (),
    ) -> Any:
        if rule is not None:
            return head_loss(input, self.weight, rule, *per_token)
        if labels is not None:
            return linear_cross_entropy(input, self.weight, labels, reduction=reduction, weights=weights)
        is_plain = torch.is_autocast_enabled(input.device.type)
        if is_plain or not is_read_only(input, self.weight, input.numel() * self.out_features):
            return F.linear(input, self.weight)
        return read_only_product(input, self.weight)


class Transformer(nn.Module):
    """A decoder composed from factories, each of which receives the dimensions that it needs.

    Args:
        vocab_size: number of tokens in the vocabulary.
        d_model: width of the residual stream.
        num_layers: number of blocks.
        num_heads: number of query heads.
        num_kv_heads: number of key/value heads, or None for num_heads.
        head_dim: size of a head, or None for d_model / num_heads.
        tie_embeddings: whether the head shares the matrix of the embedding (arXiv:1608.05859).
        dropout: probability with which an element of a sublayer's output is zeroed in training, in [0, 1).
        activation_checkpointing: recompute blocks in the backward pass instead of storing their activations: true for
            all, N >= 1 for every N-th, false for none.
        attention: factory, called once per layer with geometry, position and layer_index.
        ffn: factory, called once per layer with d_model.
        norm: factory, called with dim.
        position: factory, called once with head_dim.
        init: called once as `init(model, num_layers=…)`; returns the standard deviation of each matrix by name.
        first_ffn: feed-forward factory of the first layers, where they differ from the others.
        first_ffn_layers: number of first layers that use it, in [0, num_layers].
        residual: sum, or attention for sublayers that read a weighted sum of earlier blocks; see
            `llm.model.depth_attention`.
        residual_block: sublayers per block of residual=attention; None for an eighth of all.
        low_rank: rank of projections by their name, such as `q_proj`, in every layer; None for full rank.
        extra_tokens: number of input ids above the vocabulary, such as a mask, which the head never predicts.
        num_times: number of times that `forward` reads per token, as diffusions and flows need.

    Raises:
        ConfigError: a dimension is out of range, or two do not match.
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
        low_rank: Mapping[str, int] | None = None,
        residual: Literal["sum", "attention"] = "sum",
        residual_block: int | None = None,
        extra_tokens: int = 0,
        num_times: int = 0,
    ) -> None:
        super().__init__()
        head_dim = resolve_head_dim(d_model=d_model, num_heads=num_heads, head_dim=head_dim)
        check_decoder(
            {"vocab_size": vocab_size, "d_model": d_model, "num_layers": num_layers},
            dropout=dropout,
            activation_checkpointing=activation_checkpointing,
        )
        self.vocab_size, self.d_model, self.recompute_every = vocab_size, d_model, int(activation_checkpointing)
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position = position(head_dim=head_dim)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        geometry = AttentionGeometry(d_model=d_model, num_heads=num_heads, num_kv_heads=kv_heads, head_dim=head_dim)
        build_attention = partial(attention, geometry=geometry, position=self.position)
        build_norm = partial(norm, dim=d_model)
        ffns = choose_ffns(ffn, first_ffn, first_ffn_layers=first_ffn_layers, num_layers=num_layers)
        build_block = choose_block(residual, residual_block, num_layers=num_layers, d_model=d_model)
        self.layers = nn.ModuleList(
            build_block(i)(
                attention=build_attention(layer_index=i), ffn=build(d_model=d_model), norm=build_norm, dropout=dropout
            )
            for i, build in enumerate(ffns)
        )
        self.final_norm = build_norm()
        self.final_query = final_query(self.layers[-1], d_model=d_model)
        self.lm_head = Head(d_model, vocab_size, bias=False)
        if tie_embeddings:
            self.lm_head.weight = self.token_embedding.weight
        factor_projections(self, low_rank or {})
        self.initial_stds = init(self, num_layers=num_layers)
        # created after `init`, so that every objective starts from the same shared weights
        self.extra_embedding = build_extra_embedding(self, extra_tokens)
        self.time_embedding = build_time_embedding(self, num_times)
        self.frozen_names: frozenset[str] = frozenset()
        """Names of weights that are not trained and that a checkpoint does not repeat; see `llm.adapt`."""

    def blocks(self) -> list[Block]:
        """Return the layers in order."""
        return [cast(Block, layer) for layer in self.layers]

    def attentions(self) -> dict[str, nn.Module]:
        """Return the attention of each layer, in order, by its name in the decoder."""
        return {f"layers.{index}.attention": layer.attention for index, layer in enumerate(self.blocks())}

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"] | None = None,
        *,
        positions: Int[Tensor, "batch time"],
        document_ids: Int[Tensor, "batch time"] | None = None,
        caches: Sequence[LayerCache] | None = None,
        sight: Sight = CAUSAL,
        embedded: Float[Tensor, "batch time d_model"] | None = None,
        times: Float[Tensor, "batch time num_times"] | None = None,
    ) -> TransformerOutput:
        """Return hidden states after the final norm; `logits` projects them to vocabulary scores.

        Without `document_ids` each row is one document. With `caches`, the input is the next tokens. `embedded` takes
        the place of the embedding of input_ids, and the embedding of `times` is added to it.
        """
        x = look_up(self.token_embedding, self.extra_embedding, input_ids) if embedded is None else embedded
        if self.time_embedding is not None:
            x = x + self.time_embedding(times).to(x.dtype)
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        query = self.final_query
        stream: Any = x if query is None else Depth((as_source(x, query.eps),), None)
        for i, layer in enumerate(self.layers):
            cache = None if caches is None else caches[i]
            run = partial(layer, positions=positions, document_ids=document_ids, cache=cache, sight=sight)
            is_recomputed = self.recompute_every and i % self.recompute_every == 0
            if is_recomputed and self.training and cache is None:
                stream, own_losses, own_metrics = checkpoint(run, stream, use_reentrant=False)
            else:
                stream, own_losses, own_metrics = run(stream)
            losses |= {f"layer{i}/{name}": value for name, value in own_losses.items()}
            metrics |= {f"layer{i}/{name}": value for name, value in own_metrics.items()}
        hidden = stream if query is None else query(stream).hidden
        return TransformerOutput(hidden=self.final_norm(hidden), losses=losses, metrics=metrics)

    def head(self) -> Head:
        """Return the projection that reads hidden states."""
        return self.lm_head

    def logits(self, hidden: Float[Tensor, "batch time d_model"]) -> Float[Tensor, "batch time vocab"]:
        """Return the vocabulary scores of hidden states."""
        return self.head()(hidden)

    def loss(
        self,
        hidden: Float[Tensor, "batch time d_model"],
        labels: Int[Tensor, "batch time"],
        *,
        reduction: Reduction = "mean",
        weights: Float[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "*result"]:
        """Return the cross-entropy of hidden states in nats; see `linear_cross_entropy`."""
        return self.head()(hidden, labels, reduction, weights)

    def rule_loss(
        self, hidden: Float[Tensor, "batch time d_model"], rule: Rule, *per_token: Tensor
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "batch time"]]:
        """Return the sum and the values of a loss per token that a rule computes from its scores; see `head_loss`."""
        return self.head()(hidden, rule=rule, per_token=per_token)

    def new_caches(self, *, batch: int, max_length: int, dtype: torch.dtype) -> list[LayerCache]:
        """Return one empty cache per layer, for decoding up to max_length tokens."""
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

    def check_sight(self, sight: Sight) -> None:
        """Raise ConfigError, with the reason, where an attention of some layer does not serve a sight."""
        for layer in self.blocks():
            layer.attention.check_sight(sight)

    def flops_per_token(self, context_length: int, sight: Sight = CAUSAL) -> float:
        """Return forward FLOPs per token in a window of context_length: two per weight used, and the mixing.

        A pair of copies (`block_pair`) counts as its clean tokens, and the head reads one copy. Norms, activations and
        the embedding lookup are excluded, as is usual (Kaplan et al., arXiv:2001.08361, table 1). Training needs three
        times as many.
        """
        layers = sum(layer.flops_per_token(context_length, sight) for layer in self.blocks())
        copies = 2 if sight.kind == "block_pair" else 1
        reading = 0.0 if self.final_query is None else copies * self.final_query.flops_per_token()
        return layers + reading + 2.0 * self.vocab_size * self.d_model
