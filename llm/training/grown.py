"""Loads the weights of a smaller run into a larger decoder, and verifies that both compute the same."""

import logging
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.adapt.growth_rule import Growth
from llm.config.build import build_model, build_objective
from llm.config.checked import CheckedConfig
from llm.config.files import load
from llm.config.pieces import instantiate
from llm.contracts import Batch
from llm.errors import CheckpointError, ConfigError
from llm.model.added_inputs import with_added
from llm.model.ffn.balance.balance_rule import without_statistics
from llm.model.transformer import Transformer
from llm.ops.noise import KeyedNoise
from llm.run_folder.checkpoint import compare_state
from llm.training.trial import NO_TOKEN

TOLERANCE_OF_GROWTH = 1e-6
"""Largest difference of scores in fp64, relative to the largest score or 1, at which a function counts as unchanged."""
MOST_TOKENS = 256
"""Tokens on which both decoders are compared."""

log = logging.getLogger(__name__)


def grown_state(
    checked: CheckedConfig, folder: Path, state: Mapping[str, Tensor], model: Transformer
) -> dict[str, Tensor]:
    """Return the weights of a larger decoder, made of those of a smaller run's checkpoint.

    Args:
        checked: the configuration of the larger run.
        folder: the checkpoint in the smaller run's folder.
        state: its weights.
        model: the larger decoder.

    Raises:
        ConfigError: the sizes do not fit the growth.
        CheckpointError: the checkpoint has no config.yaml, or the larger decoder computes something else.
    """
    config = folder.resolve().parent.parent / "config.yaml"
    if not config.is_file():
        raise CheckpointError(
            f"init_from={folder}: grow= needs the config.yaml of the run, and {config} is missing; name a run folder"
        )
    growth: Growth = instantiate(checked.tree["grow"])
    with torch.random.fork_rng(devices=[]):  # the run's own draws stay those of a run without growth
        source = build_model({**checked.tree, "model": load(config)["model"]}, model.vocab_size)
        own = source.state_dict()
        known = with_added(without_statistics(state), own)
        compare_state(known, without_statistics(own), source=f"init_from={folder}")
        source.load_state_dict(own | known)
        grown = growth(source, model)
    model.load_state_dict(grown)
    if growth.keeps_function:
        difference = largest_difference(checked, source, model)
        if not difference <= TOLERANCE_OF_GROWTH:
            raise ConfigError(
                f"grow: the larger decoder's scores differ from the run's by {difference:.1e}; keep every setting of "
                "model.* except its sizes as in the run"
            )
        log.info("grown        from %s, largest difference of scores %.1e", folder, difference)
    return grown


@torch.no_grad()
def largest_difference(checked: CheckedConfig, source: Transformer, grown: Transformer) -> float:
    """Return the largest difference between the scores of two decoders in fp64, relative to the largest score or 1."""
    objective = build_objective(checked.tree, vocab_size=grown.vocab_size, bos_id=NO_TOKEN)
    length = checked.run.context_length
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(grown.vocab_size, (max(1, MOST_TOKENS // length), length), generator=generator)
    places = torch.arange(length).expand_as(ids)
    batch = Batch(input_ids=ids, labels=ids, positions=places, document_ids=torch.zeros_like(ids))
    scores: list[Any] = []
    for model in (source, grown):
        precise = deepcopy(model).double().eval()
        inputs = objective.prepare(precise, batch, KeyedNoise(0, 0, torch.arange(len(ids)))).inputs
        scores.append(precise.logits(precise(**inputs).hidden))
    return float((scores[0] - scores[1]).abs().max() / scores[0].abs().max().clamp_min(1.0))
