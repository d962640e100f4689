"""Short names for torch's private foreach operations on lists of tensors, which torch.optim uses too.

On a GPU each operation runs a few kernels for the whole list; on a CPU it runs a loop. No other module imports the
private functions.
"""

from typing import Any

import torch

_torch: Any = torch

add_ = _torch._foreach_add_
copy_ = _torch._foreach_copy_
lerp = _torch._foreach_lerp
lerp_ = _torch._foreach_lerp_
mul_ = _torch._foreach_mul_
norm = _torch._foreach_norm
sign = _torch._foreach_sign
sign_ = _torch._foreach_sign_
sub = _torch._foreach_sub
sub_ = _torch._foreach_sub_
