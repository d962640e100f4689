"""Computes the bytes per rank of weights, gradients and optimizer state, by stage of ZeRO."""

from typing import NamedTuple


class RankBytes(NamedTuple):
    """Bytes that one rank keeps between updates, without activations and temporary buffers."""

    weights: float
    gradients: float
    state: float
    """The optimizer's state, and fp32 masters where they are not the weights themselves."""

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(self)


def bytes_per_rank(
    *, parameters: int, state_bytes: int, stage: int, ranks: int, precision: str, offload_optimizer: bool = False
) -> RankBytes:
    """Return the bytes that one of `ranks` ranks keeps on its device.

    Stage 0 shards nothing, stage 1 the state, stage 2 also the gradients, and stage 3 also the weights. From stage 1 on
    the engine updates fp32 masters. They are a copy of the rank's part of the weights, except at stage 3 under
    autocast, where they are the weights.

    Args:
        parameters: number of parameters of the whole model.
        state_bytes: bytes of optimizer state for the whole model.
        stage: stage of ZeRO.
        ranks: number of devices that share the model.
        precision: value of `trainer.precision`; weights are bf16 with bf16-true.
        offload_optimizer: whether state and masters are in the host's memory, to which gradients are copied.

    Source: Rajbhandari et al., "ZeRO", arXiv:1910.02054, section 5 and figure 1.
    """
    weight = 2 if precision == "bf16-true" else 4
    part = parameters / ranks
    masters = 0.0 if stage == 0 or (stage == 3 and precision == "bf16-mixed") else 4 * part
    state = (state_bytes if stage == 0 else state_bytes / ranks) + masters
    gradients = 4 * part if stage >= 2 else weight * parameters
    return RankBytes(
        weights=weight * (part if stage == 3 else parameters),
        gradients=0.0 if offload_optimizer and stage >= 2 else gradients,
        state=0.0 if offload_optimizer and stage else state,
    )


def bytes_sent_per_update(*, parameters: int, stage: int, ranks: int, accumulation: int, precision: str) -> float:
    """Return the bytes that each rank sends per update, by ring algorithms, without the optimizer's own messages.

    An all-reduce over R ranks sends 2(R−1)/R of its data; a reduce-scatter or an all-gather sends (R−1)/R. Stages 0 and
    1 reduce once per update, stages 2 and 3 after each micro-batch. Stages 1 and 2 gather the new weights, and stage 3
    gathers them for every forward and backward pass.

    Source: arXiv:1910.02054, section 7.
    """
    size = (2 if precision == "bf16-true" else 4) * parameters * (ranks - 1) / ranks
    if stage == 0:
        return 2 * size
    if stage == 1:
        return 2 * size
    return size * accumulation + (size if stage == 2 else 2 * size * accumulation)
