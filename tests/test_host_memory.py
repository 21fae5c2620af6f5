"""Large host tensors in huge pages: ordinary tensors in every other respect."""

import gc
import mmap
import re
import sys
from pathlib import Path

import pytest
import torch

from hetero_attn import host_memory

LARGE = (5, 1 << 20)                                 # 20 MiB of fp32


def address_space_bytes() -> int:
    return int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_is_an_ordinary_tensor(shape, dtype):
    made = host_memory.empty(shape, dtype)
    assert made.shape == torch.Size(shape) and made.dtype == dtype and made.is_contiguous() and made.device.type == "cpu"
    made.fill_(3)
    assert made.sum().item() == 3 * made.numel()


@pytest.mark.skipif(not (hasattr(mmap, "MADV_HUGEPAGE") and Path("/sys/kernel/mm/transparent_hugepage").exists()),
                    reason="this system has no huge pages to ask for")
def test_large_tensors_begin_at_a_huge_page():
    assert host_memory.empty(LARGE, torch.float32).data_ptr() % host_memory.HUGE_PAGE_BYTES == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_goes_back_with_the_last_view():
    before = address_space_bytes()
    view = host_memory.empty((256 << 20,), torch.uint8)[5:10].fill_(1)
    assert view.tolist() == [1] * 5 and address_space_bytes() - before > 200 << 20
    del view
    gc.collect()
    assert address_space_bytes() - before < 100 << 20


def test_a_system_that_declines_gives_ordinary_memory(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no")

    monkeypatch.setattr(host_memory.mmap, "mmap", refuse)
    assert host_memory.empty(LARGE, torch.float32).fill_(1).sum().item() == 5 << 20
