"""Schedules of the batch size: pure functions f(batch_tokens) -> {tokens seen: tokens per update from then on}.

The noise scale grows during training, so a small batch suffices at the start (McCandlish et al., arXiv:1812.06162,
appendix A.1; Smith et al., "Don't Decay the Learning Rate, Increase the Batch Size", arXiv:1711.00489). The `scaling`
rule gives the learning rate of each stage from the batch of that stage.
"""

from collections.abc import Sequence

from llm.errors import ConfigError


def constant_batch(*, batch_tokens: int) -> dict[int, int]:
    """Return one batch size for the whole run.

    Args:
        batch_tokens: tokens per update.
    """
    return {0: batch_tokens}


def stages(*, batch_tokens: int, starts: Sequence[int], shares: Sequence[float]) -> dict[int, int]:
    """Return stages, each of which uses a share of the full batch from a given number of tokens on.

    Args:
        batch_tokens: tokens per update of the full batch.
        starts: tokens seen at which each stage begins, in rising order; the first is 0.
        shares: share of batch_tokens for each stage, in (0, 1].

    Raises:
        ConfigError: if no stage starts at 0, `starts` and `shares` differ in length, or a share is out of range or
            does not give a whole number of tokens.
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
    """Return stages that start with a share of the full batch and double it after every `every_tokens` tokens.

    Args:
        batch_tokens: tokens per update of the full batch.
        start_share: share of the full batch in the first stage: 1, 1/2, 1/4, 1/8, ...
        every_tokens: tokens between doublings, at least 1.

    Raises:
        ConfigError: if the share has another value or does not give a whole number of tokens, or every_tokens is below
            1.
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
