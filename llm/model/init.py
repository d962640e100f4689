"""Initial values of the weights."""

import math

import torch
from torch import nn

from llm.errors import ConfigError

RESIDUAL_OUTPUTS = ("o_proj", "down_proj", "latent_out_proj")
"""Names of the projections that write to the residual stream."""


@torch.no_grad()
def fan_in_normal(model: nn.Module, *, num_layers: int, embedding_std: float, head_std: float) -> dict[str, float]:
    """Draw every matrix from N(0, 1/d_in), so that a unit-RMS input gives a unit-RMS output at any width.

    The standard deviation of projections into the residual stream is divided by sqrt(2 num_layers), so that the sum
    over all sublayers has unit variance. Expert stacks [experts, d_out, d_in] follow the same rule per expert. Gains
    and biases keep the values that their modules set. The result maps names to standard deviations.

    Args:
        model: model whose parameters are drawn in place, in the order of `named_parameters`.
        num_layers: depth; each layer writes to the residual stream twice.
        embedding_std: standard deviation of the token embedding.
        head_std: standard deviation of an untied head; small, so that the first predictions are almost uniform.

    Raises:
        ConfigError: a standard deviation is negative or not finite.

    Source: He et al., arXiv:1502.01852, eq. 10 without the rectifier's 2; depth factor of Radford et al.,
    "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.3.
    """
    for key, std in {"embedding_std": embedding_std, "head_std": head_std}.items():
        if not 0 <= std < math.inf:
            raise ConfigError(f"model.init.{key}={std}: must be at least 0 and finite; 0.02 is the default")
    stds = {}
    for name, parameter in model.named_parameters():
        *_, owner, _ = ("", *name.split("."))
        if parameter.ndim < 2:
            continue
        if owner == "token_embedding":
            std = embedding_std
        elif owner == "lm_head":
            std = head_std
        else:
            std = parameter.shape[-1] ** -0.5
            if owner in RESIDUAL_OUTPUTS or (owner == "second" and name.split(".")[-3] in RESIDUAL_OUTPUTS):
                std /= math.sqrt(2 * num_layers)
        parameter.normal_(0.0, std)
        stds[name] = std
    return stds
