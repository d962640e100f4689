"""Computes the bytes per rank of weights, gradients and optimizer state, by stage of ZeRO."""

from typing import NamedTuple


class RankBytes(NamedTuple):
    """Bytes that one rank keeps between updates, without activations and temporary buffers."""

    weights: float
    gradients: float
    state: float
    """The optimizer's state, and fp32 masters where the engine keeps them apart from the weights."""

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(self)


def bytes_per_rank(
    *, parameters: int, state_bytes: int, stage: int, ranks: int, precision: str, offload_optimizer: bool = False
) -> RankBytes:
    """Return the bytes that one of `ranks` ranks keeps on its device.

    Stage 0 splits nothing; 1 the state, 2 the gradients too, 3 the weights too. From stage 1 on the engine steps fp32
    masters of its own: a copy of the rank's part of the weights, except at stage 3 under autocast, where they are one.

    Args:
        parameters: of the whole model.
        state_bytes: of the optimizer over the whole model.
        stage: of ZeRO.
        ranks: devices that share the model.
        precision: as `trainer.precision`; bf16-true holds bf16 weights.
        offload_optimizer: state and masters are in the host's memory; gradients are handed over as they come.

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
    """Return the bytes that each rank sends in an update, by ring algorithms, without an optimizer's own messages.

    A reduction over all ranks sends 2(R−1)/R of its data, one whose result is split (R−1)/R, and so does gathering.
    Stage 0 and 1 reduce once an update, stages 2 and 3 after each micro-batch; 1 and 2 gather the new weights, stage 3
    gathers them for every forward and backward pass.

    Source: arXiv:1910.02054, section 7.
    """
    size = (2 if precision == "bf16-true" else 4) * parameters * (ranks - 1) / ranks
    if stage == 0:
        return 2 * size
    if stage == 1:
        return 2 * size
    return size * accumulation + (size if stage == 2 else 2 * size * accumulation)
