"""The group of ranks behind the communicator: its memory, its launches, and what becomes of a wait that did not end.

Operations are in communicator.py. Here is what all of them need: where a tensor lies in symmetric memory, a launch with the fields that
every call has, and the look at the status word.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from hetero_attn.communicator import Communicator, CommunicatorError
from hetero_attn_hopper import abi, plan
from hetero_attn_hopper.device import Device
from hetero_attn_hopper.heap import Heap
from hetero_attn_hopper.kernels import source_of
from hetero_attn_hopper.lane import Lane, Mark
from hetero_attn_hopper.layout import Layout
from hetero_attn_hopper.memory import SymmetricMemory

FOREVER_NS = 1 << 62
REMEMBERED = 512                                     # calls whose texts are kept for an error
log = logging.getLogger("hetero_attn")


class Ctas(NamedTuple):
    """CTAs of a sum by what runs beside it: nothing, or the products that follow an attention's or an MLP's sum."""

    alone: int
    attention: int
    mlp: int


class HopperGroup(Communicator):
    """Owns the symmetric memory. door: 'multimem' or 'unicast'; why_not_multimem: reasons, where it is the other."""

    def __init__(
        self, base: Communicator, device: Device, memory: SymmetricMemory, layout: Layout, door: str, ctas: Ctas,
        why_not_multimem: Sequence[str] = (),
    ) -> None:
        super().__init__(base.rank, base.world_size, device=base.device, base=base)
        self.layout, self.door, self.why_not_multimem, self.how = layout, door, list(why_not_multimem), memory.how
        self.objections: dict[str, int] = {}         # why calls went to the base, and how many
        self._base = base                            # `base` itself may be exchanged before close(); failures are this one's
        self._launcher, self._memory, self._ctas = device, memory, ctas
        self._lane = Lane(device.streams, self.device, lambda: device.capture(self.device))
        self._heap = Heap(layout.heap_at, layout.size)
        self._shared_bytes = device.shared_bytes(self.device)
        self._number, self._recent = 0, deque(maxlen=REMEMBERED)
        self._used: list[int] = []                   # places of the heap that the call in progress uses
        self._open = True

    # ---- what the schedules may ask ----------------------------------------------------------------------------------------------

    @property
    def ctas(self) -> Ctas:
        return self._ctas

    @property
    def cta_choices(self) -> tuple[int, ...]:
        return tuple(count for count in (2, 4, 8, 16, 32) if count <= max(self._ctas.alone, plan.MIN_CTAS))

    def use_ctas(self, attention: int | None = None, mlp: int | None = None) -> None:
        """CTAs of started sums after an attention and after an MLP, the same on every rank; None = as it is. Raises ValueError."""
        for name, count in (("attention_ctas", attention), ("mlp_ctas", mlp)):
            if count is not None and (reason := plan.ctas_reason(name, count)):
                raise ValueError(reason)
        self._ctas = self._ctas._replace(attention=attention or self._ctas.attention, mlp=mlp or self._ctas.mlp)

    def ctas_beside(self, site: str) -> int:
        """CTAs of a started call at a site."""
        return self._ctas.attention if site.rpartition(".")[2] == "o_proj" else self._ctas.mlp

    # ---- memory ------------------------------------------------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """In this rank's symmetric memory, where the kernels of all ranks reach it; in ordinary memory when that is full."""
        nbytes = math.prod(shape) * dtype.itemsize
        taken = self._take(nbytes) if nbytes and self._open and self._base.failure is None else None
        if taken is None:
            return super().empty(shape, dtype)
        return taken.view(dtype).view(tuple(shape))

    def _take(self, nbytes: int) -> torch.Tensor | None:
        """uint8 [nbytes] of the heap, None where there is no room."""
        made: list[torch.Tensor] = []

        def hold(start: int, size: int) -> Any:
            holder, tensor = self._memory.view(start, size)
            made.append(tensor)
            return holder

        found = self._heap.take(nbytes, hold, captured=bool(self._lane.capture), stream=self._lane.users_stream)
        if found is None:
            return None
        self._lane.wait(found[1].after)
        self._lane.wait_for_streams(found[1].streams)
        return made[0]

    def _place(self, x: torch.Tensor, padded: int) -> int | None:
        """The offset of x in symmetric memory if the kernels may take it there, its bytes rounded up to `padded`; else None."""
        offset = x.data_ptr() - self._memory.address
        if not self.layout.heap_at <= offset < self.layout.size or offset % 16 or not x.is_contiguous() or x.is_neg() or x.is_conj():
            return None
        if not self._heap.holds(offset, x.nbytes, padded):
            return None
        self._used.append(offset)
        return offset

    def _room(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes]: the symmetric room for one tensor, this call's until the next."""
        return self._memory.own[self.layout.room_at : self.layout.room_at + nbytes]

    # ---- launching ---------------------------------------------------------------------------------------------------------------

    def _launch(self, operation: str, dtype: torch.dtype, launch: plan.Launch, text: str, of: Sequence[object],
                fields: Mapping[str, Any]) -> None:
        """One kernel. of: what must be every rank's alike in this call, beside operation, dtype and CTAs."""
        self._number = self._number + 1 & 0xFFFFFFFF
        self._recent.append((self._number, text, time.monotonic()))
        timeout_ns = min(self.timeout_s * 1e9, FOREVER_NS)
        call = abi.pack({
            "buffer": self._memory.buffers, "multicast": self._memory.multicast, "status": self._memory.status_address,
            "rank": self.rank, "world": self.world_size, "timeout_ns": int(timeout_ns), "number": self._number,
            "signature": abi.signature(operation, str(dtype), launch.ctas, *of), **fields,
        })
        kernel = source_of(operation, dtype, self.door)
        self._launcher.launch(kernel, (launch.ctas,), (launch.threads,), launch.shared_bytes, call, self.device)

    def _marked(self, mark: Mark | None) -> None:
        """The call in progress is enqueued: the places it uses are free again only behind it."""
        for offset in self._used:
            self._heap.used(offset, mark)
        self._used.clear()

    # ---- failing and ending ------------------------------------------------------------------------------------------------------

    def _check_status(self) -> None:
        """Raise what a kernel has told: which rank did not come, at which slot. Does not wait for the device."""
        if not self._open or self._base.failure is not None:
            self._base.raise_if_broken()
            raise CommunicatorError(f"rank {self.rank} of {self.world_size}: the communicator has been closed", rank=self.rank)
        if word := self._memory.status.item():
            status = abi.Status.of(word)
            text, began = next(((text, began) for number, text, began in self._recent if number == status.number),
                               ("a call of a CUDA graph", time.monotonic()))
            raise self._base.fail(text, RuntimeError(status.words), began)

    def raise_if_broken(self) -> None:
        if self._open and self._base.failure is None:
            self._check_status()
        else:
            super().raise_if_broken()

    def _below_for(self, operation: str, x: torch.Tensor, objections: Sequence[str]) -> bool:
        """Whether the base does the call; why is kept, and logged the first time."""
        if x.device.type != self.device.type:
            objections = [f"x is on {x.device}, the kernels run on {self.device}"]
        for objection in objections:
            known = f"{operation}: {objection}"
            if known not in self.objections and len(self.objections) < REMEMBERED:
                log.info("hopper leaves %s to %s: %s", operation, type(self._base).__name__, objection)
                self.objections[known] = 0
            if known in self.objections:
                self.objections[known] += 1
        return bool(objections)

    def close(self) -> None:
        """Free the group; tensors from empty() stay valid as long as they are referred to. A wait of the last calls that ran into the
        time-out, and that nobody has been told of, is logged: close() raises nothing."""
        if self._open and self._base.failure is None:
            try:
                self._check_status()
            except CommunicatorError as error:
                log.error("%s; found when the communicator was closed", error)
        self._open = False
        self._memory.close()
        super().close()
