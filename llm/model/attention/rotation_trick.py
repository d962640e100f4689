"""The rotation trick: a gradient for keys that are replaced by codes."""

import torch
from jaxtyping import Float
from torch import Tensor


def rotate_to_codes(
    keys: Float[Tensor, "batch time kv_heads head_dim"], codes: Float[Tensor, "batch time kv_heads head_dim"]
) -> Float[Tensor, "batch time kv_heads head_dim"]:
    """Return λ R k, where R rotates k to its code and λ is the ratio of their lengths, both held constant.

        R = I − 2 ŵ ŵᵀ + 2 ĉ k̂ᵀ,   w = k̂ + ĉ,   a hat marks a unit vector

    Source: Fifty et al., arXiv:2410.06424, eq. 4.
    """
    tiny = torch.finfo(keys.dtype).tiny ** 0.5
    with torch.no_grad():
        key_norm, code_norm = (x.norm(dim=-1, keepdim=True).clamp_min(tiny) for x in (keys, codes))
        key_unit, code_unit = keys / key_norm, codes / code_norm
        middle = key_unit + code_unit
        middle = middle / middle.norm(dim=-1, keepdim=True).clamp_min(tiny)
    turned = keys - 2 * (keys * middle).sum(-1, keepdim=True) * middle
    turned = turned + 2 * (keys * key_unit).sum(-1, keepdim=True) * code_unit
    return turned * (code_norm / key_norm)
