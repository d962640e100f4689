import pytest
import torch

from llm.ops.flops import measured_matmul_flops, peak_flops, table_peak


@pytest.mark.parametrize(
    ("name", "bf16", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", True, 989.4e12),
        ("NVIDIA H100 PCIe", True, 756e12),
        ("NVIDIA H200", True, 989.4e12),
        ("NVIDIA A100-SXM4-80GB", True, 312e12),
        ("NVIDIA A100-SXM4-80GB", False, 19.5e12),
        ("NVIDIA L40S", True, 362.05e12),
        ("NVIDIA GeForce RTX 4090", True, 165.2e12),
        ("Some Accelerator 9", True, None),
    ],
)
def test_peak_flops_are_found_by_device_name_and_none_for_an_unknown_one(name, bf16, peak):
    assert table_peak(name, bf16=bf16) == peak


def test_peak_flops_of_a_cpu_are_measured():
    assert measured_matmul_flops(torch.float32, size=256, repeats=2) > 1e8


def test_a_device_of_another_kind_has_no_peak_flops():
    assert peak_flops(torch.device("meta"), bf16=True) is None
