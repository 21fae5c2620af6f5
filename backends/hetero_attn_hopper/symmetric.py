"""Memory that all ranks of a host reach: torch's symmetric memory where it will, which alone has a multicast address, else CUDA IPC.

Two processes on one GPU (a test's way of having ranks) are refused by torch's unless told otherwise, and have no multicast. Every rank says
how it fared before any of them goes on, so they end up with one kind. Never run on a device so far.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from hetero_attn.communicator import Communicator, CommunicatorError
from hetero_attn_hopper.layout import Layout
from hetero_attn_hopper.memory import SymmetricMemory
from hetero_attn_hopper.telling import on_all_ranks, told_by_all

OVERLAPPING = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"


class Span:
    """Bytes of device memory in the form that torch makes a tensor of; the tensor's storage keeps it, and so `keep`."""

    def __init__(self, address: int, nbytes: int, keep: Any) -> None:
        self.keep = keep
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 2, "strides": None}


def make(base: Communicator, layout: Layout, *, overlapping: bool) -> SymmetricMemory:
    """The memory, by the first way that works on every rank. All ranks call it together. Raises RuntimeError with every way's reason."""
    reasons = []
    for way in (by_torch, by_ipc):
        try:
            return way(base, layout, overlapping)
        except CommunicatorError:
            raise
        except RuntimeError as error:
            reasons.append(str(error))
    raise RuntimeError("; ".join(reasons))


def by_torch(base: Communicator, layout: Layout, overlapping: bool) -> SymmetricMemory:
    """torch.distributed._symmetric_memory over a group of its own, which carries a few addresses and handles at the start, nothing
    later."""

    def allocate() -> tuple[Any, torch.Tensor]:
        import torch.distributed._symmetric_memory as symmetric_memory

        if overlapping:
            os.environ.setdefault(OVERLAPPING, "1")
        own = symmetric_memory.empty(layout.size, dtype=torch.uint8, device=base.device)
        return symmetric_memory, _cleared(own, layout)

    def enter() -> None:
        groups.append(torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=min(base.timeout_s, 1e6))))

    def leave() -> None:
        while groups:
            torch.distributed.destroy_process_group(groups.pop())

    def meet() -> tuple[Any, list[int]]:
        handle = symmetric_memory.rendezvous(own, groups[0].group_name)
        return handle, buffers_of(handle, own, base)

    name, groups = "torch's symmetric memory", []
    symmetric_memory, own = on_all_ranks(base, name, allocate)
    try:
        on_all_ranks(base, name, enter)
        handle, buffers = on_all_ranks(base, name, meet)
    except RuntimeError:
        leave()                                      # its threads and sockets, before the next way is tried
        raise
    memory = _memory(own, buffers, int(handle.multicast_ptr or 0), name, [handle])
    memory.leave = leave
    return memory


def buffers_of(handle: Any, own: torch.Tensor, base: Communicator) -> list[int]:
    """Where every rank's tensor is: torch gives the allocations' beginnings, and one offset within them for all (multicast_ptr has it in
    already). Raises RuntimeError where this rank would find its own memory elsewhere."""
    if (handle.rank, handle.world_size) != (base.rank, base.world_size):
        raise RuntimeError(f"it takes this for rank {handle.rank} of {handle.world_size}, the communicator for {base.rank} of "
                           f"{base.world_size}")
    buffers = [int(each) + int(getattr(handle, "offset", 0)) for each in handle.buffer_ptrs]
    if len(buffers) != base.world_size or buffers[base.rank] != own.data_ptr():
        raise RuntimeError(f"its buffer of rank {base.rank} is at {buffers[base.rank]:#x}, the tensor at {own.data_ptr():#x}")
    return buffers


def by_ipc(base: Communicator, layout: Layout, overlapping: bool) -> SymmetricMemory:
    """Each rank's memory, opened by the others through torch's own sharing of CUDA storages between processes."""

    def allocate() -> tuple[torch.Tensor, list[list[Any]]]:
        own = _cleared(torch.empty(layout.size, dtype=torch.uint8, device=base.device), layout)
        # One for each receiver, since torch counts down one reference a share: (device, handle, size, offset, counter, its offset, event,
        # whether to wait for it).
        shares = [[] if rank == base.rank else own.untyped_storage()._share_cuda_() for rank in range(base.world_size)]
        return own, [[each.hex() if isinstance(each, bytes) else each for each in share] for share in shares]

    def open_all() -> list[Any]:
        opened = []
        for rank, shares in enumerate(told):
            if rank == base.rank:
                opened.append(own.untyped_storage())
            else:
                _, handle, size, offset, counter, counter_offset, event, waits = shares[base.rank]
                opened.append(torch.UntypedStorage._new_shared_cuda(
                    base.device.index or 0, bytes.fromhex(handle), size, offset, bytes.fromhex(counter), counter_offset,
                    bytes.fromhex(event), waits))
        return opened

    name = "CUDA IPC"
    own, said = on_all_ranks(base, name, allocate)
    told = told_by_all(base, said)
    storages = on_all_ranks(base, name, open_all)
    return _memory(own, [each.data_ptr() for each in storages], 0, name, storages)


def _cleared(own: torch.Tensor, layout: Layout) -> torch.Tensor:
    own[: layout.staging_at].zero_()
    torch.cuda.synchronize(own.device)               # before any rank's first kernel
    return own


def _memory(own: torch.Tensor, buffers: list[int], multicast: int, how: str, keep: list[Any]) -> SymmetricMemory:
    status = torch.zeros(1, dtype=torch.int64, pin_memory=True)      # under unified addressing the device has it at the same address
    return SymmetricMemory(own, buffers, multicast, how, _view_of(own), status, status.data_ptr(), [*keep, own])


def _view_of(own: torch.Tensor) -> Callable[[int, int], tuple[Any, torch.Tensor]]:
    address, device = own.data_ptr(), own.device

    def view(offset: int, nbytes: int) -> tuple[Any, torch.Tensor]:
        span = Span(address + offset, nbytes, own)
        return span, torch.as_tensor(span, device=device)

    return view
