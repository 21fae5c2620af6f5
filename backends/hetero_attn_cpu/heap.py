"""Communicator.empty() in shared memory: tensors in this rank's segments, given back when nothing refers to them any more.

A row-parallel linear writes its summand straight into such a tensor and the other ranks read it there. Tensors live for a layer, so there
are few at a time: first fit with coalescing is quick enough. When it is full a tensor is made in private memory and collectives copy it;
what was lacking is remembered, and the group makes more room together (`wanted`).
"""

from __future__ import annotations

import bisect
import math
import threading
import weakref
from collections import deque

import torch

from hetero_attn_cpu.segments import Segment

ALIGN = 64                                           # a cache line: two ranks' tensors share none
LARGEST = 1 << 30                                    # of one segment added; a tensor beyond it stays private


class _Block(weakref.ref):
    """A tensor's memory: dies with its storage, and knows what to give back."""

    __slots__ = ("heap", "size", "start")


class Heap:
    """The free bytes of a list of own segments; addresses are those of this process. `wanted` = bytes that were lacking, 0 = none."""

    def __init__(self) -> None:
        self.wanted = 0
        self._may_grow = True
        self.ranges: list[tuple[int, int]] = []      # [from, to) of every segment's heap, for x that lies in one
        self._segments: list[tuple[int, Segment]] = []
        self._free: list[tuple[int, int]] = []       # (address, bytes), sorted
        self._given: dict[int, _Block] = {}         # by address
        self._returned: deque[_Block] = deque()      # by the collector, in any thread and at any time
        # The caller makes a layer's next tensor while the communication thread makes one for a result, or adds a segment. Reentrant:
        # the collector may run in here, and close() what is in its cycles.
        self._lock = threading.RLock()

    def add(self, segment: Segment, reserved: int = 0) -> None:
        """Use the segment from byte `reserved` on."""
        start, end = segment.address + reserved, segment.address + segment.size
        with self._lock:
            self.ranges.append((start, end))
            self._segments.append((segment.address, segment))
            bisect.insort(self._free, (start, end - start))
            self.wanted = 0

    def stop_growing(self) -> None:
        """There is no more memory to be had: ask for none."""
        self.wanted, self._may_grow = 0, False

    def holds(self, address: int) -> bool:
        for start, end in self.ranges:
            if start <= address < end:
                return True
        return False

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """An uninitialised tensor here, contiguous; None when there is no room."""
        with self._lock:
            return self._empty(shape, dtype)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        while self._returned:
            self._give_back(self._returned.popleft())
        size = (math.prod(shape) * dtype.itemsize + ALIGN - 1) & -ALIGN
        if not size:
            return None
        index = next((index for index, (_, free) in enumerate(self._free) if free >= size), None)
        if index is None:
            if size <= LARGEST and self._may_grow:
                self.wanted = max(self.wanted, 2 * size, sum(end - start for start, end in self.ranges))
            return None
        address, free = self._free[index]
        if free == size:
            self._free.pop(index)
        else:
            self._free[index] = (address + size, free - size)
        memory = self._memory(address, size)
        tensor = torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)
        block = _Block(memory, _returned)
        block.heap, block.start, block.size = self, address, size
        self._given[address] = block
        return tensor

    def _memory(self, address: int, size: int) -> memoryview:
        for base, segment in self._segments:
            if base <= address < base + segment.size:
                return segment.memory[address - base : address - base + size]
        raise AssertionError("a free address lies in a segment")

    def _give_back(self, block: _Block) -> None:
        del self._given[block.start]
        start, size = block.start, block.size
        index = bisect.bisect(self._free, (start, 0))
        if index < len(self._free) and start + size == self._free[index][0] and not self._is_border(start + size):
            size += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == start and not self._is_border(start):
            start, size = self._free[index - 1][0], size + self._free.pop(index - 1)[1]
            index -= 1
        self._free.insert(index, (start, size))

    def _is_border(self, address: int) -> bool:
        return any(address == start for start, _ in self.ranges)


def _returned(block: _Block) -> None:
    block.heap._returned.append(block)
