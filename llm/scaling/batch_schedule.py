"""Batch sizes over a run: pure functions f(batch_tokens) -> {tokens seen: tokens per update from then on}.

A small batch serves while the noise scale is small and grows with it (McCandlish et al., arXiv:1812.06162, appendix
A.1; Smith et al., "Don't Decay the Learning Rate, Increase the Batch Size", arXiv:1711.00489). The learning rate of
each stage follows from the `scaling` rule at the stage's batch.
"""

from collections.abc import Sequence

from llm.errors import ConfigError


def constant(*, batch_tokens: int) -> dict[int, int]:
    """One batch size for the whole run.

    Args:
        batch_tokens: tokens per update.
    """
    return {0: batch_tokens}


def stages(*, batch_tokens: int, starts: Sequence[int], shares: Sequence[float]) -> dict[int, int]:
    """Give shares of the full batch from given numbers of tokens on.

    Args:
        batch_tokens: tokens per update of the full batch.
        starts: tokens seen at which each stage begins, rising; the first 0.
        shares: of batch_tokens, one a stage, in (0, 1].

    Raises:
        ConfigError: no stage at 0, other than one share a stage, a share out of range, or no whole number of tokens.
    """
    if not starts or starts[0] != 0 or list(starts) != sorted(set(starts)):
        raise ConfigError(f"batch_schedule.starts={list(starts)}: must rise from 0; try [0, 500000]")
    if len(shares) != len(starts):
        raise ConfigError(
            f"batch_schedule.shares={list(shares)}: needs one for each of batch_schedule.starts={list(starts)}; "
            "give as many"
        )
    changes = {}
    for seen, share in zip(starts, shares, strict=True):
        if not 0 < share <= 1:
            raise ConfigError(
                f"batch_schedule.shares={list(shares)}: must lie in (0, 1]; 0.25 is a quarter of the batch"
            )
        tokens = share * batch_tokens
        if round(tokens) < 1 or abs(tokens - round(tokens)) > 1e-6:
            raise ConfigError(
                f"batch_schedule.shares={list(shares)}: {share:g} gives {tokens:g} of batch_tokens={batch_tokens}; "
                "take a share that leaves whole windows, such as 0.25"
            )
        changes[int(seen)] = round(tokens)
    return changes


def doubling(*, batch_tokens: int, start_share: float, every_tokens: int) -> dict[int, int]:
    """Start with a share of the full batch and double it every so many tokens, until it is full.

    Args:
        batch_tokens: tokens per update of the full batch.
        start_share: 1/2, 1/4, 1/8, ...
        every_tokens: tokens between doublings, at least 1.

    Raises:
        ConfigError: another share, one that is no whole number of tokens, or every_tokens below 1.
    """
    if every_tokens < 1:
        raise ConfigError(f"batch_schedule.every_tokens={every_tokens}: must be at least 1; try {batch_tokens * 50}")
    shares, share = [], float(start_share)
    while 0 < share < 1:
        shares.append(share)
        share *= 2
    if share != 1:
        raise ConfigError(f"batch_schedule.start_share={start_share}: must be 1/2, 1/4, 1/8, ...; try 0.25")
    starts = [every_tokens * i for i in range(len(shares) + 1)]
    return stages(batch_tokens=batch_tokens, starts=starts, shares=[*shares, 1.0])
