"""torch's grouped operations on lists of tensors, under the names that the rules use; nothing else imports them.

On a GPU each is a few kernels for the whole list; on a CPU a loop. torch.optim is built on the same functions.
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
