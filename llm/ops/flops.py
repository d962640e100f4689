"""Peak FLOP/s of devices, of which model FLOPs utilization (MFU) is a share."""

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from llm.ops.products import HAS_ONEDNN, onednn_product

TERA = 1e12

FORWARD_AND_BACKWARD = 3
"""FLOPs of a training step per FLOP of its forward pass: the backward pass multiplies by each weight twice."""

GPU_PEAKS = {
    "H200": (989.4, 66.9),
    "GH200": (989.4, 66.9),
    "H100 PCIe": (756.0, 51.2),
    "H100 NVL": (835.5, 60.0),
    "H100": (989.4, 66.9),
    "B200": (2250.0, 75.0),
    "A100": (312.0, 19.5),
    "A10": (125.0, 31.2),
    "L40S": (362.05, 91.6),
    "L40": (181.05, 90.5),
    "L4": (121.0, 30.3),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
}
"""Dense bf16 and fp32 peaks in TFLOP/s by a part of the device's name; the longest part that matches is used.

Sources: NVIDIA's data sheets for H200, H100 (SXM, PCIe, NVL), GH200, B200, A100, A10, L40S, L40 and L4 (dense, which
is half of the figures with sparsity), the Ada whitepaper v2.1 (RTX 4090, bf16 with fp32 accumulation) and the GA102
whitepaper v2.1 (RTX 3090, likewise).
"""


def peak_flops(device: torch.device, *, bf16: bool) -> float | None:
    """Return the dense peak of one device in FLOP/s: GPUs from the table, a CPU by measurement, None if unknown.

    Args:
        device: device of the model.
        bf16: whether matrix products are in bf16; else they are in fp32.
    """
    if device.type == "cpu":
        return measured_matmul_flops(torch.bfloat16 if bf16 else torch.float32)
    if device.type != "cuda":
        return None
    return table_peak(torch.cuda.get_device_name(device), bf16=bf16)


def table_peak(name: str, *, bf16: bool) -> float | None:
    """Return the peak of the GPU with this name in FLOP/s, or None where the table does not have it."""
    words = name.replace("-", " ")
    fitting = [part for part in GPU_PEAKS if all(word in words.split() for word in part.split())]
    if not fitting:
        return None
    return GPU_PEAKS[max(fitting, key=len)][0 if bf16 else 1] * TERA


@functools.cache
def measured_matmul_flops(dtype: torch.dtype, *, size: int = 1024, repeats: int = 6) -> float:
    """Return the best measured rate of this CPU for a product of two square matrices, in FLOP/s.

    In fp32 both MKL and oneDNN are measured, because training may use either; the kernels take turns.
    """
    generator = torch.Generator().manual_seed(0)  # the run's own numbers stay as they are
    left, right = (torch.randn(size, size, generator=generator).to(dtype) for _ in range(2))
    kernels: list[Callable[[Tensor, Tensor], Tensor]] = [torch.mm]
    if dtype == torch.float32 and HAS_ONEDNN:
        kernels.append(onednn_product)
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            for kernel in kernels:
                start = time.perf_counter()
                kernel(left, right)
                seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[len(kernels) :])
