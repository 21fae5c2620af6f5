"""hopper-emulated: the hopper communicator on CPU tensors, its ranks threads, its kernels run by csrc/simt's executor. For tests only.

Everything above the launch is the device's own: arguments, the choice with its reasons, shards, the memory's layout, meetings and
time-outs.
"""

import ctypes
import threading
from pathlib import Path

import torch
from hetero_attn_hopper.making import hopper_communicator
from hetero_attn_hopper.memory import SymmetricMemory

from hetero_attn.communicator import Communicator
from hetero_attn.compiler import compiler_reason
from hetero_attn.profile import DeviceProfile, load_profile
from hetero_attn.testing.simt import Program, host_write

NAME = "hopper-emulated"
SIZES = {"symmetric_stage_bytes": 4096, "symmetric_room_bytes": 4 << 20, "symmetric_heap_bytes": 1 << 20}


class Node:
    """What the ranks share: their memory, and the flag that lets them give up together. door: whether there is a multicast address.

    root: where csrc/hopper's sources are (seeded faults). weak: memory at system scope is weak. stall_s: rank -> how long its blocks sleep
    at their ends, and behind barrier number stall_barrier. order: of threads.
    """

    def __init__(self, world_size: int, *, multicast: bool = True, root: Path | None = None, weak: bool = False,
                 stall_s: dict[int, float] | None = None, stall_barrier: int = 0, order: int = 0, counted: bool = False,
                 time_limit_s: float = 60.0) -> None:
        self.world_size, self.multicast, self.root, self.weak, self.order, self.counted = world_size, multicast, root, weak, order, counted
        self.stall_s, self.stall_barrier, self.time_limit_s = stall_s or {}, stall_barrier, time_limit_s
        self.memory: list[torch.Tensor | None] = [None] * world_size
        self.cancelled, self.launched, self._lock = ctypes.c_int32(0), [], threading.Lock()
        self._programs: dict = {}

    def program(self, kernel) -> Program:
        with self._lock:
            if kernel.name not in self._programs:
                source = kernel.source if self.root is None else self.root / kernel.source
                program = Program(source, kernel.defines, counted=self.counted)
                program.kernel.build()
                self._programs[kernel.name] = program
            return self._programs[kernel.name]


class EmulatedDevice:
    """One rank's device on a Node."""

    type, streams = "cpu", None

    def __init__(self, node: Node, rank: int) -> None:
        self.node, self.rank = node, rank

    def unavailable_reasons(self, index=None) -> list[str]:
        reason = compiler_reason()
        return [f"the executor needs a C++ compiler: {reason}"] if reason else []

    def facts(self, device):
        return {"host": "emulated", "name": str(self.rank), "capability": [9, 0] if self.node.multicast else [8, 0]}

    def objections(self, facts, rank):
        return []

    def symmetric(self, base, layout, facts):
        own = torch.zeros(layout.size + 256, dtype=torch.uint8)
        own = own[-own.data_ptr() % 256 :][: layout.size]
        own[layout.staging_at :].random_(0, 256)         # what nobody has written is no number to rely on
        self.node.memory[self.rank] = own
        base.barrier()
        status = torch.zeros(1, dtype=torch.int64)

        def view(offset, nbytes):
            held = (ctypes.c_char * nbytes).from_address(own.data_ptr() + offset)
            held.keep = own
            return held, torch.frombuffer(held, dtype=torch.uint8)

        buffers = [each.data_ptr() for each in self.node.memory]
        return SymmetricMemory(own, buffers, int(self.node.multicast), "emulated", view, status, status.data_ptr(), [own])

    def capture(self, device):
        return 0

    def shared_bytes(self, device):
        return 227 << 10

    def prepare(self, kernels, device):
        """They are compiled when they are first launched."""

    def launch(self, kernel, grid, block, shared_bytes, call, device):
        node = self.node
        node.launched.append((self.rank, kernel.function, grid, block))
        node.program(kernel).launch(kernel.function, grid, block, [call], shared_bytes=shared_bytes, resident=True, order=node.order,
                                    cancelled=node.cancelled, agent=self.rank if node.weak else None, time_limit_s=node.time_limit_s,
                                    stall_s=node.stall_s.get(self.rank, 0.0),
                                    stall_barrier=node.stall_barrier if self.rank in node.stall_s else 0)


def emulated_profile(**changes) -> DeviceProfile:
    """Small memory, two CTAs."""
    sets = [f"{name}={value}" for name, value in (SIZES | {"overlap.communication_units": 2} | changes).items()]
    return load_profile("cpu", sets=sets)


def emulated(base: Communicator, node: Node, *, door: str | None = None, **changes) -> Communicator:
    """The communicator of one rank. All ranks call it together. Raises LookupError with the reasons."""
    made = hopper_communicator(base, emulated_profile(**changes), EmulatedDevice(node, base.rank), door)
    if isinstance(made, list):
        raise LookupError("; ".join(made))
    return made


def written(node: Node, rank: int, to: torch.Tensor, values: torch.Tensor) -> None:
    """values into `to` as a kernel that ran before on this rank's device would write them."""
    if node.weak:
        host_write(rank, to, values)
    else:
        to.copy_(values)


__all__ = ["NAME", "EmulatedDevice", "Node", "emulated", "emulated_profile", "written"]
