"""Host memory that a device copies from and to without holding up the host, and what it takes.

torch's own allocator of pinned memory rounds each allocation up to a power of two, by default of any size: a layer's KV of 0.5 GiB and a
block more would take 1 GiB, and the whole of a plan twice what it says. So for CUDA ordinary pages are allocated and registered with the
driver, to the page. Other devices have only torch's allocator, and the rounded size is counted.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hetero_attn import host_memory
from hetero_attn.quantity import shown_bytes

log = logging.getLogger("hetero_attn")


def pinned_bytes(nbytes: int, device: str) -> int:
    """What pinned memory of nbytes takes of the host: whole pages for CUDA, a power of two for any other device, nbytes for the CPU."""
    if device == "cpu" or nbytes <= 0:
        return max(nbytes, 0)
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE if device == "cuda" else 1 << (nbytes - 1).bit_length()


def pinned_share(room: int, device: str) -> int:
    """Of host memory, bytes that tensors of any sizes may have together once they are pinned: half of it where sizes are rounded up to a
    power of two, which is less than twice."""
    return room if device in ("cpu", "cuda") else room // 2


def pinned(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor of host memory for copies from and to the device. Raises what torch.empty does (RuntimeError)."""
    if device.type != "cuda":
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
    return registered(shape, dtype, torch.cuda.cudart(), lambda: torch.cuda.synchronize(device), lambda: _forget_error(device))


def registered(
    shape: Sequence[int], dtype: torch.dtype, cudart: Any, synchronize: Callable[[], None], forget_error: Callable[[], None] = lambda: None
) -> torch.Tensor:
    """Pages of their own, registered through `cudart` (torch.cuda.cudart(); ROCm's torch has the same names) until the tensor is collected,
    and `synchronize` has returned: a copy may still be on its way. Where registering fails a log line says so, and copies wait."""
    size = torch.Size(shape)
    nbytes = pinned_bytes(size.numel() * dtype.itemsize, "cuda")
    if not nbytes:
        return torch.empty(size, dtype=dtype)
    whole = host_memory.empty((nbytes + mmap.PAGESIZE,), torch.uint8)            # registrations must not share a page
    start = -whole.data_ptr() % mmap.PAGESIZE
    tensor = whole[start : start + size.numel() * dtype.itemsize].view(dtype).view(size)
    address = whole.data_ptr() + start
    code = int(cudart.cudaHostRegister(address, nbytes, 0))
    if code:
        forget_error()
        log.warning("%s of host memory for KV are not pinned (cudaHostRegister: error %d), so copies hold up the host", shown_bytes(nbytes),
                    code)
        return tensor
    # The finalizer holds `whole`, so that the pages outlive their registration. At the process' end the driver lets go of them itself.
    weakref.finalize(tensor, _unregister, cudart, address, synchronize, whole).atexit = False
    return tensor


def _unregister(cudart: Any, address: int, synchronize: Callable[[], None], whole: torch.Tensor) -> None:
    with contextlib.suppress(RuntimeError):                                      # of a device that is lost nothing is on its way
        synchronize()
    if int(cudart.cudaHostUnregister(address)):
        log.warning("host memory at %#x could not be unregistered", whole.data_ptr())


def _forget_error(device: torch.device) -> None:
    """The runtime keeps a failed call's error for whoever launches the next kernel; let that be this one."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)
