"""Locates and instantiates the pieces that a configuration names."""

from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import OmegaConf

from llm.config.piece_signature import Signature
from llm.config.signatures import is_allowed, locate, signature_at
from llm.errors import CrucibleError


def piece_at(target: str) -> Any:
    """Return what a `_target_` names; None where it names nothing or nothing that is allowed, which `check` reports."""
    try:
        return locate(target) if is_allowed(target) else None
    except (ImportError, AttributeError):
        return None


def piece_signature(target: str) -> Signature | None:
    """Return the signature of what a `_target_` names, None where it names nothing or nothing that is allowed."""
    try:
        return signature_at(target) if is_allowed(target) else None
    except (ImportError, AttributeError):
        return None


def suited_rule(optimizer: str, rules: Mapping[str, str]) -> str:
    """Return the rule that `conf/scaling/auto.yaml` has for an optimizer's `_target_`, `none` where it has none."""
    from llm.scaling.suitability import family_of  # imports torch, which a mistake in a key does not need

    piece = piece_at(optimizer)
    return rules.get((piece and family_of(piece)) or "", "none")


OmegaConf.register_new_resolver("suited_rule", suited_rule, replace=True)


def instantiate(node: Any, **arguments: Any) -> Any:
    """Build a node as Hydra does, with plain dicts and lists; a piece's own complaint comes out unwrapped."""
    try:
        return hydra_instantiate(node, _convert_="all", **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, CrucibleError):
            raise error.__cause__ from None
        raise
