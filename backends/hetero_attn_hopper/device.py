"""What the communicator asks of a device: memory that all ranks reach, launches, streams. CUDA's is cuda.py; tests put csrc/simt's executor
here.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from hetero_attn.communicator import Communicator
from hetero_attn.cubin import KernelSource
from hetero_attn_hopper.layout import Layout
from hetero_attn_hopper.memory import SymmetricMemory


class Device(Protocol):
    """type: the torch device type whose tensors it takes. streams: torch.cuda or its like; None = a launch is done when it returns."""

    type: str
    streams: Any | None

    def unavailable_reasons(self, index: int | None = None) -> list[str]:
        """Why nothing runs on number `index` of its type here, None = the current one; [] = it does."""

    def facts(self, device: torch.device) -> dict[str, Any]:
        """What the other ranks must know of this one's device, as JSON: host, name (of the device within it), capability (major, minor)."""

    def objections(self, facts: list[dict[str, Any]], rank: int) -> list[str]:
        """Why this rank does not reach the others' devices, by everyone's facts."""

    def symmetric(self, base: Communicator, layout: Layout, facts: list[dict[str, Any]]) -> SymmetricMemory:
        """Memory of layout.size bytes that all ranks reach. All ranks call it together. Raises RuntimeError, on all ranks or on none."""

    def capture(self, device: torch.device) -> int:
        """A number of its own for the graph's capture that the current stream is in; 0 = none."""

    def shared_bytes(self, device: torch.device) -> int:
        """The most shared memory of one block."""

    def prepare(self, kernels: list[KernelSource], device: torch.device) -> None:
        """Have the kernels loaded: what a CUDA graph captures must not load anything. Raises BuildError and the driver's errors."""

    def launch(
        self, kernel: KernelSource, grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int, call: bytes, device: torch.device
    ) -> None:
        """Enqueue one kernel with `call` as its one argument, by value, behind what the calling thread's stream holds."""
