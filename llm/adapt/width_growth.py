"""Continues a trained decoder with duplicated channels, heads and hidden units."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.adapt.growth_rule import copied
from llm.errors import ConfigError
from llm.model.attention.attention_layer import Attention
from llm.model.transformer import Transformer

AXES: dict[str, tuple[str | None, str | None]] = {
    "token_embedding": (None, "written"),
    "extra_embedding": (None, "written"),
    "inner": ("units", None),
    "outer": ("written", "units"),
    "q_proj": ("heads", "read"),
    "k_proj": ("kv_heads", "read"),
    "v_proj": ("kv_heads", "read"),
    "o_proj": ("written", "heads"),
    "gate_proj": ("units", "read"),
    "up_proj": ("units", "read"),
    "down_proj": ("written", "units"),
    "router": (None, "read"),
    "lm_head": (None, "read"),
}
"""What the rows and columns of each matrix are, by the module that owns it; None does not grow.

A matrix that reads duplicates divides its weight among them; one that writes them writes the same to each.
"""
NORMS = ("attention_norm", "ffn_norm", "final_norm")


class WidthGrowth:
    """Growth in width: channels, heads and hidden units are duplicated, and what reads duplicates divides its weight.

        writes: W'[i, :] = W[g(i), :]          reads: W'[:, j] = s_j ⊙ W[:, g(j)],  Σ_{j: g(j)=c} s_j = 1

    Each channel of the residual stream is duplicated equally often, so that norms see the same mean square. Equal
    shares would leave duplicates equal for ever, since they would receive equal gradients. `random` draws a share per
    weight.
    A tied head reads with the embedding's own rows, so the gain of the final norm is divided instead.

    Args:
        split: random or even shares.

    Source: Chen et al., "Net2Net", arXiv:1511.05641, section 2.2; for decoders bert2BERT, arXiv:2110.07143 (FPI).
    """

    def __init__(self, *, split: Literal["random", "even"]) -> None:
        self.split = split

    @property
    def keeps_function(self) -> bool:
        """Whether the larger decoder computes the same at the start."""
        return True

    def __call__(self, source: Transformer, target: Transformer) -> dict[str, Tensor]:
        """Return the weights of the wider decoder.

        Raises:
            ConfigError: a size shrinks or cannot be reached by duplicates, or a weight has no rule.
        """
        copies = check_sizes(source, target)
        given, state = source.state_dict(), {}
        is_tied = target.lm_head.weight is target.token_embedding.weight
        for name, expected in target.state_dict().items():
            if name not in given:
                raise ConfigError(
                    f"grow=width: the run has no weight {name}; keep model.* as in the run except its widths"
                )
            state[name] = self._grown(name, given[name], expected, source, target)
            if is_tied and name.startswith("final_norm."):
                state[name] = state[name] / copies
        if is_tied:
            state["lm_head.weight"] = state["token_embedding.weight"]
        return state

    def _grown(self, name: str, tensor: Tensor, expected: Tensor, source: Transformer, target: Transformer) -> Tensor:
        parts = name.split(".")
        if any(part in NORMS for part in parts):
            return tensor[duplicates(len(tensor), len(expected))]
        owner = next((part for part in reversed(parts) if part in AXES), None)
        if owner is not None and parts[-1] == "bias":
            rows = AXES[owner][0] or "units"
            return tensor[_index(rows, len(tensor), len(expected), source, target)]
        if owner is None or tensor.ndim < 2:
            return copied(name, tensor, expected, grow="width").clone()
        rows, columns = AXES[owner]
        if owner == "lm_head" and target.lm_head.weight is target.token_embedding.weight:
            columns = "written"
        rows = None if parts[-2] == "first" else rows  # factors of a projection: see `FactoredLinear`
        columns = None if parts[-2] == "second" else columns
        if rows is not None:
            index = _index(rows, tensor.shape[-2], expected.shape[-2], source, target)
            tensor = tensor.index_select(-2, index)
        if columns is not None:
            index = _index(columns, tensor.shape[-1], expected.shape[-1], source, target)
            tensor = tensor.index_select(-1, index)
            if columns != "written":
                tensor = tensor * self.shares(tensor.shape, index).to(tensor.dtype)
        return copied(name, tensor, expected, grow="width")

    def shares(self, shape: torch.Size, index: Int[Tensor, " columns"]) -> Float[Tensor, "*shape"]:
        """Return the share of each weight of a matrix; those of the duplicates of a column sum to 1 in every row."""
        drawn = torch.rand(shape, dtype=torch.float64) if self.split == "random" else torch.ones(shape).double()
        sums = torch.zeros(*shape[:-1], int(index.max()) + 1, dtype=torch.float64).index_add_(-1, index, drawn)
        return drawn / sums.index_select(-1, index)


def duplicates(before: int, after: int) -> Int[Tensor, " after"]:
    """Return the old unit of each new one: all in order, again and again."""
    return torch.arange(after) % before


def head_duplicates(before: tuple[int, int], after: tuple[int, int]) -> Int[Tensor, " heads"]:
    """Return the old query head of each new one, for (query heads, key/value heads) before and after.

    A new query head reads a duplicate of the key/value head that its old one read.
    """
    old_group, new_group = before[0] // before[1], after[0] // after[1]
    heads = torch.arange(after[0])
    return heads // new_group % before[1] * old_group + heads % new_group % old_group


def _index(axis: str, before: int, after: int, source: Transformer, target: Transformer) -> Int[Tensor, " after"]:
    """Return the old row or column of each new one."""
    if axis not in ("heads", "kv_heads"):
        return duplicates(before, after)
    old, new = (_heads(model) for model in (source, target))
    heads = head_duplicates(old, new) if axis == "heads" else duplicates(old[1], new[1])
    size = before // (old[0] if axis == "heads" else old[1])
    return (heads[:, None] * size + torch.arange(size)).flatten()


def _heads(model: Transformer) -> tuple[int, int]:
    attention: Attention = model.blocks()[0].attention
    return attention.num_heads, attention.num_kv_heads


def check_sizes(source: Transformer, target: Transformer) -> int:
    """Return how often each channel is duplicated; raise ConfigError for sizes that duplicates cannot reach."""
    (heads, kv_heads), (more, more_kv) = _heads(source), _heads(target)
    old, new = source.blocks()[0].attention, target.blocks()[0].attention
    if target.d_model % source.d_model:
        raise ConfigError(
            f"grow=width: model.d_model={target.d_model} must be a multiple of the run's {source.d_model}, so that "
            f"norms see each channel equally often; try {2 * source.d_model}"
        )
    if new.head_dim != old.head_dim:
        raise ConfigError(
            f"grow=width: model.head_dim={new.head_dim}, and the run has {old.head_dim}, which positions depend on; "
            f"set model.head_dim={old.head_dim}, or model.num_heads={target.d_model // old.head_dim}"
        )
    if more_kv < kv_heads or more // more_kv < heads // kv_heads:
        raise ConfigError(
            f"grow=width: {more} heads on {more_kv} key/value heads do not contain the run's {heads} on {kv_heads}; "
            f"set model.num_heads={2 * heads} model.num_kv_heads={2 * kv_heads}"
        )
    if source.lm_head.weight is not source.token_embedding.weight and (
        target.lm_head.weight is target.token_embedding.weight
    ):
        raise ConfigError("grow=width: the run's head is not tied to its embedding; set model.tie_embeddings=false")
    return target.d_model // source.d_model
