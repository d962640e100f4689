"""Ladder side-tuning: a side network that is trained beside a frozen decoder."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm.adapt.side_network import SideNetwork
from llm.contracts import CAUSAL, LayerCache, Sight
from llm.errors import ConfigError
from llm.model.added_inputs import ADDED, look_up
from llm.model.block import Block
from llm.model.transformer import Head, Transformer, TransformerOutput


class LadderTransformer(Transformer):
    """A frozen decoder and a side network that reads its hidden states and makes the prediction.

        h_0 … h_L = decoder(x), without a graph
        s ← W_0 norm(h_0);   s ← block_k(μ_k W_k norm(h_k) + (1 − μ_k) s),  μ_k = sigmoid(gate_k / T)
        head=frozen: scores = head(norm(h_L + U norm(s))),  U = 0 at the start      head=own: scores = V norm(s)

    No activation of the decoder is kept and no gradient passes through it. With `head=frozen` the function at the start
    is that of the decoder.

    Args:
        backbone: the decoder; its parameters are frozen, and its modules become those of this model.
        reduction: d_model of the decoder divided by that of the side network, at least 1.
        every: read every n-th layer, at least 1; the last layer is always read.
        temperature: T of the gates, above 0.
        head: frozen or own.
        backbone_sight: whether the decoder sees what the objective shows, or earlier tokens alone.
        base: wavelength base of the side network's rotary positions.
        init: called as `init(side network, num_layers=…)`; returns the standard deviation of each matrix by name.

    Raises:
        ConfigError: a setting is out of its range, or d_model is no multiple of reduction.

    Source: Sung et al., "LST: Ladder Side-Tuning", arXiv:2206.06522, section 3; kexue.fm/archives/9138.
    """

    def __init__(
        self,
        backbone: Transformer,
        *,
        reduction: int,
        every: int,
        temperature: float,
        head: Literal["frozen", "own"],
        backbone_sight: Literal["objective", "causal"],
        base: float,
        init: Callable[..., dict[str, float]],
    ) -> None:
        nn.Module.__init__(self)  # the decoder is built already, and its modules are taken over below
        _check_settings(backbone, reduction=reduction, every=every, temperature=temperature)
        self.vocab_size, self.d_model, self.recompute_every = (
            backbone.vocab_size, backbone.d_model, backbone.recompute_every
        )  # fmt: skip
        for name, module in backbone.named_children():
            self.add_module(name, module.requires_grad_(False))
        for name in ("extra_embedding", "time_embedding", "final_query"):
            if name not in self._modules:
                self.add_module(name, None)
        self.frozen_names = frozenset(name for name in backbone.state_dict() if not name.startswith(ADDED))
        self.backbone_sight = backbone_sight
        self.ladder = _side_network(
            backbone, d_side=backbone.d_model // reduction, every=every, temperature=temperature, head=head, base=base
        )
        stds = init(self.ladder, num_layers=len(self.ladder.reads))
        if self.ladder.up is not None:
            nn.init.zeros_(self.ladder.up.weight)
            stds["up.weight"] = 0.0
        self.initial_stds = backbone.initial_stds | {f"ladder.{name}": std for name, std in stds.items()}
        self.train(self.training)

    def train(self, mode: bool = True) -> "LadderTransformer":
        """Set the mode of the side network; the decoder always evaluates."""
        super().train(mode)
        for name, module in self.named_children():
            if name != "ladder":
                module.eval()
        return self

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
        """Return hidden states that `logits` projects to vocabulary scores; see `Transformer.forward`."""
        below = len(self.layers)
        seen = {"positions": positions, "document_ids": document_ids}
        with torch.no_grad():
            x = look_up(self.token_embedding, self.extra_embedding, input_ids) if embedded is None else embedded
            states = self._states(x, times, None if caches is None else caches[:below], self._own_sight(sight), seen)
        side = self.ladder(
            [state for index, state in enumerate(states) if index == 0 or index - 1 in self.ladder.reads],
            extra_ids=None if input_ids is None else input_ids - self.vocab_size,
            times=times,
            caches=None if caches is None else caches[below:],
            recompute_every=self.recompute_every,
            sight=sight,
            **seen,
        )
        if self.ladder.up is None:
            return TransformerOutput(hidden=side, losses={}, metrics={})
        raised = states[-1] + self.ladder.up(side)
        return TransformerOutput(hidden=self.final_norm(raised), losses={}, metrics={})

    def _states(
        self, x: Tensor, times: Tensor | None, caches: Sequence[LayerCache] | None, sight: Sight, seen: dict[str, Any]
    ) -> list[Tensor]:
        """Return the embedding and the output of each layer of the decoder."""
        if self.time_embedding is not None:
            x = x + self.time_embedding(times).to(x.dtype)
        states = [x]
        for index, layer in enumerate(self.layers):
            cache = None if caches is None else caches[index]
            states.append(layer(states[-1], cache=cache, sight=sight, **seen).hidden)
        return states

    def _own_sight(self, sight: Sight) -> Sight:
        """Return the sight of the decoder under a sight of the objective."""
        return CAUSAL if self.backbone_sight == "causal" else sight

    def head(self) -> Head:
        """Return the projection that reads hidden states."""
        return self.lm_head if self.ladder.own_head is None else self.ladder.own_head

    def side_blocks(self) -> list[Block]:
        """Return the blocks of the side network."""
        return self.ladder.layers()

    def new_caches(self, *, batch: int, max_length: int, dtype: torch.dtype) -> list[LayerCache]:
        """Return the caches of the decoder's layers, followed by those of the side network."""
        device = self.token_embedding.weight.device
        options = {"batch": batch, "max_length": max_length, "device": device, "dtype": dtype}
        below = super().new_caches(batch=batch, max_length=max_length, dtype=dtype)
        return below + [block.attention.new_cache(**options) for block in self.side_blocks()]

    def check_sight(self, sight: Sight) -> None:
        """Raise ConfigError, with the reason, where the decoder or the side network does not serve a sight."""
        if self.backbone_sight == "causal" and sight.kind not in ("causal", "bidirectional"):
            raise ConfigError(
                "adapt.backbone_sight=causal: a clean copy of a text would read the noisy one before it; set "
                "adapt.backbone_sight=objective"
            )
        super().check_sight(self._own_sight(sight))
        for block in self.side_blocks():
            block.attention.check_sight(sight)

    def frozen_flops_per_token(self, context_length: int, sight: Sight = CAUSAL) -> float:
        """Return forward FLOPs per token of the decoder's layers, which have no backward pass."""
        own = self._own_sight(sight)
        return sum(layer.flops_per_token(context_length, own) for layer in self.blocks())

    def flops_per_token(self, context_length: int, sight: Sight = CAUSAL) -> float:
        """Return forward FLOPs per token of the decoder, the side network and the head."""
        head = 2.0 * self.head().weight.numel()
        side = self.ladder.flops_per_token(context_length, sight)
        return self.frozen_flops_per_token(context_length, sight) + side + head


def _check_settings(backbone: Transformer, *, reduction: int, every: int, temperature: float) -> None:
    d_model = backbone.d_model
    if backbone.final_query is not None:
        raise ConfigError(
            "adapt=ladder: model.residual=attention has no sum of layers that a side network could read; use adapt=lora"
        )
    if reduction < 1 or d_model % reduction or d_model // reduction % 2:
        near = [n for n in (2, 4, 8, 16) if d_model % (2 * n) == 0]
        raise ConfigError(
            f"adapt.reduction={reduction}: must divide model.d_model={d_model} into an even width; try one of {near}"
        )
    if every < 1:
        raise ConfigError(f"adapt.every={every}: must be at least 1; 1 reads each layer")
    if not temperature > 0:
        raise ConfigError(f"adapt.temperature={temperature}: must be above 0; 0.1 is usual")


def _side_network(
    backbone: Transformer, *, d_side: int, every: int, temperature: float, head: str, base: float
) -> SideNetwork:
    """Return the side network for a decoder; its heads are as large as the decoder's where they fit its width."""
    count, head_dim = len(backbone.layers), backbone.blocks()[0].attention.head_dim
    extra, times = backbone.extra_embedding, backbone.time_embedding
    return SideNetwork(
        d_model=backbone.d_model,
        d_side=d_side,
        head_dim=head_dim if d_side % head_dim == 0 else d_side,
        reads=[index for index in range(count) if (index + 1) % every == 0 or index == count - 1],
        temperature=temperature,
        base=base,
        extra_tokens=0 if extra is None else extra.num_embeddings,
        num_times=0 if times is None else len(times.inner),
        vocab_size=backbone.vocab_size if head == "own" else None,
    )
