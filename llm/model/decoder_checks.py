"""Checks the dimensions of a decoder, and completes those that follow from others."""

from collections.abc import Callable

from torch import nn

from llm.errors import ConfigError


def resolve_head_dim(*, d_model: int, num_heads: int, head_dim: int | None) -> int:
    """Return head_dim, or d_model / num_heads where it is None.

    Raises:
        ConfigError: num_heads or head_dim is below 1, or num_heads does not divide d_model and head_dim is None.
    """
    if num_heads < 1:
        raise ConfigError(f"model.num_heads={num_heads}: must be at least 1; try 4")
    if head_dim is not None and head_dim < 1:
        raise ConfigError(f"model.head_dim={head_dim}: must be at least 1, or null for d_model / num_heads")
    if head_dim is not None:
        return head_dim
    if d_model % num_heads:
        divisors = [n for n in range(1, d_model + 1) if d_model % n == 0]
        near = sorted(sorted(divisors, key=lambda n: abs(n - num_heads))[:2])
        raise ConfigError(
            f"model.num_heads={num_heads}: must divide model.d_model={d_model}; try {' or '.join(map(str, near))}"
        )
    return d_model // num_heads


def choose_ffns(
    ffn: Callable[..., nn.Module], first_ffn: Callable[..., nn.Module] | None, *, first_ffn_layers: int, num_layers: int
) -> list[Callable[..., nn.Module]]:
    """Return the feed-forward factory of each layer.

    Raises:
        ConfigError: there are more first layers than layers, or first layers have no factory.
    """
    if not 0 <= first_ffn_layers <= num_layers:
        raise ConfigError(
            f"model.first_ffn_layers={first_ffn_layers}: must lie in [0, model.num_layers={num_layers}]; set 0 for none"
        )
    if first_ffn_layers and first_ffn is None:
        raise ConfigError(f"model.first_ffn_layers={first_ffn_layers}: model.first_ffn is missing; use model=moe")
    return [first_ffn or ffn] * first_ffn_layers + [ffn] * (num_layers - first_ffn_layers)


def check_decoder(sizes: dict[str, int], *, dropout: float, activation_checkpointing: bool | int) -> None:
    """Raise ConfigError for a size below 1, a dropout outside [0, 1) or a negative activation_checkpointing."""
    for key, value in sizes.items():
        if value < 1:
            raise ConfigError(f"model.{key}={value}: must be at least 1; choose a size with model/size=tiny")
    if not 0 <= dropout < 1:
        raise ConfigError(f"model.dropout={dropout}: must lie in [0, 1); set 0 to disable it")
    if activation_checkpointing < 0:
        raise ConfigError(
            f"model.activation_checkpointing={activation_checkpointing}: must be true, false, or N above 0 to "
            "recompute every N-th block; try 2"
        )
