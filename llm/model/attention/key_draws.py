"""Random draws of distinct keys, on which codes start and are revived."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def draw_keys(keys: Float[Tensor, "tokens kv_heads head_dim"], count: int, *, seed: int) -> Tensor:
    """Return `count` random keys per head, [kv_heads count head_dim]; no key repeats before all were drawn once.

    Args:
        keys: candidates.
        count: number of keys to draw per head; may exceed the number of candidates.
        seed: seed of a generator of its own, so that a recomputed forward does not shift the one of dropout.
    """
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-count // keys.shape[0])
    draws = []
    for head in keys.unbind(1):
        order = torch.cat([_distinct_first(head, generator) for _ in range(rounds)])
        draws.append(head[order[:count]])
    return torch.stack(draws)


def _distinct_first(keys: Float[Tensor, "tokens head_dim"], generator: torch.Generator) -> Int[Tensor, " tokens"]:
    """Return a random order in which keys that equal an earlier one in bf16 come last.

    Equal tokens have equal keys where keys carry no position, and one of two equal codes would stay unused.
    """
    order = torch.randperm(len(keys), generator=generator, device="cpu").to(keys.device)
    _, group = torch.unique(keys[order].bfloat16().float(), dim=0, return_inverse=True)
    places = torch.arange(len(keys), device=keys.device)
    first = torch.full_like(places, len(keys)).scatter_reduce(0, group, places, "amin")
    return order[(first[group] != places).long().argsort(stable=True)]
