"""DiVeQ: keys are replaced by codes with a gradient for both, so that codes need no loss of their own."""

import torch
from jaxtyping import Float
from torch import Tensor


def moved_to_codes(
    keys: Float[Tensor, "batch time kv_heads head_dim"], codes: Float[Tensor, "batch time kv_heads head_dim"]
) -> Float[Tensor, "batch time kv_heads head_dim"]:
    """Return the codes in value, with the part of the gradient along the error for codes and the rest for keys.

        k̂ = k + ‖C − k‖ · û,   û = sg((C − k) / ‖C − k‖);   ∂L/∂C = ⟨g, û⟩ û,   ∂L/∂k = g − ⟨g, û⟩ û,   g = ∂L/∂k̂

    Where a key equals its code, û is 0 and the whole gradient is that of the key.

    Source: Vali et al., arXiv:2509.26469, in the form of Su, kexue.fm/archives/11328.
    """
    error = codes - keys
    with torch.no_grad():
        unit = error / error.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(error.dtype).tiny ** 0.5)
    return keys + (error * unit).sum(-1, keepdim=True) * unit
