import resource
import subprocess
import sys

import pytest

from llm.ops.allocator import keep_freed_memory

FAULTS = """
import resource, sys, torch
if sys.argv[1] == "keep":
    from llm.ops.allocator import keep_freed_memory
    assert keep_freed_memory()
size = 64 * 2**20
for i in range(40):
    if i == 30:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size // 4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    out = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return int(out.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_large_freed_block_is_reused_for_the_next_one():
    pages = 64 * 2**20 // resource.getpagesize()
    assert faults("keep") < pages  # of the last ten of forty; else each is faulted in anew
    assert faults("plain") > 5 * pages


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr("llm.ops.allocator.platform.libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
