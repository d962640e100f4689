"""Derives the width of experts, so that a mixture and a dense layer can be compared fairly."""

from typing import Literal

from llm.errors import ConfigError

Match = Literal["active", "total", "flops", "none"]


def expert_width(
    *,
    match: Match,
    d_model: int,
    d_ff: int,
    num_experts: int,
    top_k: int,
    num_shared_experts: int,
    latent: int | None = None,
) -> int:
    """Return the hidden width of an expert, shared ones included.

        active: d_ff / (k + s)                      a token uses as many weights as the dense layer
        total:  d_ff / (E + s)                      all experts together have as many weights as the dense layer
        flops:  ⌊(3 d_ff − E) / (3 (k + s))⌋        as many operations as the dense layer, with the router's;
                                                    rounded down by less than one unit per active expert
        none:   d_ff                                an expert is as wide as the dense layer

    Args:
        match: the quantity that equals that of a dense layer of width d_ff.
        d_model: width of the residual stream.
        d_ff: hidden width of the dense layer.
        num_experts: E, the number of experts to choose from.
        top_k: k, experts per token.
        num_shared_experts: s, the number of experts that every token uses.
        latent: l, the width that routed experts read and write, or None for d_model = d. With it the projections into
            and out of that space count too, and widths are rounded down by less than one unit:
            active ⌊(3 d d_ff − 2 d l) / (3 l k + 3 d s)⌋, total likewise with E for k, flops with d E less above.

    Raises:
        ConfigError: the width would be below 1, or not whole under `active` and `total`.
    """
    if match == "none":
        return d_ff
    if latent is not None:
        routed = num_experts if match == "total" else top_k
        router = d_model * num_experts if match == "flops" else 0
        room = 3 * d_model * d_ff - 2 * d_model * latent - router
        width = room // (3 * latent * routed + 3 * d_model * num_shared_experts)
        if width < 1:
            raise ConfigError(
                f"model.ffn.match={match}: d_ff={d_ff} leaves no width for {routed} experts beside projections to "
                f"model.ffn.latent={latent}; lower latent or raise d_ff"
            )
        return width
    if match == "flops":
        width = (3 * d_ff - num_experts) // (3 * (top_k + num_shared_experts))
        if width < 1:
            raise ConfigError(
                f"model.ffn.match=flops: d_ff={d_ff} leaves no width for top_k={top_k} experts after a router of "
                f"num_experts={num_experts}; lower num_experts or raise d_ff"
            )
        return width
    routed, key = (top_k, "top_k") if match == "active" else (num_experts, "num_experts")
    width, rest = divmod(d_ff, routed + num_shared_experts)
    if rest or width < 1:
        raise ConfigError(_not_whole(match, d_ff, routed, key, num_shared_experts))
    return width


def _not_whole(match: str, d_ff: int, routed: int, key: str, shared: int) -> str:
    parts = routed + shared
    valid_counts = [n - shared for n in range(1 + shared, d_ff + 1) if d_ff % n == 0]
    counts = sorted(sorted(valid_counts, key=lambda n: abs(n - routed))[:2])
    widths = sorted({max(d_ff // parts, 1) * parts, (d_ff // parts + 1) * parts})
    alternatives = [f"{key}={' or '.join(map(str, counts))}"] if counts else []
    alternatives.append(f"d_ff={' or '.join(map(str, widths))}")
    return (
        f"model.ffn.match={match}: d_ff={d_ff} shared by {parts} experts ({key}={routed}, num_shared_experts={shared}) "
        f"is not a whole width; try {', or '.join(alternatives)}"
    )
