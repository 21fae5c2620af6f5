"""Large tensors of host memory in huge pages, where Linux has them: weights and KV caches are read from end to end for every token, and
with 4 KiB pages the address translation costs as much as the reading (one core of a virtual machine, AMD Zen 4: 28 -> 55 GB/s when the host
backs them too). Advice only: where the system declines, the memory is ordinary.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch

HUGE_PAGE_BYTES = 2 << 20
FROM_BYTES = 2 * HUGE_PAGE_BYTES                     # below this what is wasted at both ends outweighs the gain


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """torch.empty(shape), in huge pages where it is large, on the CPU, and the system takes the advice.

    The memory is the tensor's alone and is given back with its last view. Raises what torch.empty does (RuntimeError: out of memory).
    """
    size = torch.Size(shape)
    nbytes = size.numel() * dtype.itemsize
    if torch.device(device).type != "cpu" or nbytes < FROM_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=dtype, device=device)
    try:
        # Room to begin at a huge page; what lies before it is never touched, and so takes no memory.
        pages = mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:                                  # a limit on address space, or a kernel without huge pages
        return torch.empty(size, dtype=dtype, device=device)
    whole = torch.frombuffer(pages, dtype=torch.uint8)                   # holds the mapping; views of it hold `whole`'s storage
    start = -whole.data_ptr() % HUGE_PAGE_BYTES
    return whole[start : start + nbytes].view(dtype).view(size)
