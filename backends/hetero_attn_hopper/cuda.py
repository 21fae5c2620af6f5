"""CUDA as the communicator's device: launches through the driver on torch's current stream, memory by symmetric.py.

Kernels come prebuilt, from the cache, or from NVRTC (hetero_attn/cubin.py), for the architecture that is here. Never run on a device so
far.
"""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import torch

from hetero_attn.communicator import Communicator
from hetero_attn.cubin import KernelSource, nvrtc_reason
from hetero_attn_hopper import driver, plan, symmetric
from hetero_attn_hopper.kernels import cubins
from hetero_attn_hopper.layout import Layout
from hetero_attn_hopper.memory import SymmetricMemory

OLDEST_CAPABILITY = (7, 0)


class CudaDevice:
    """How a kernel gets onto a GPU, and what the ranks must know of one another's."""

    type = "cuda"

    def __init__(self) -> None:
        self._functions: dict[tuple, driver.Function] = {}
        self._lock = threading.Lock()

    @property
    def streams(self) -> Any:
        return torch.cuda

    def unavailable_reasons(self, index: int | None = None) -> list[str]:
        """Torch's build, the device, and a cubin or NVRTC."""
        if torch.version.hip:
            return ["torch is a ROCm build, these kernels are CUDA's"]
        if torch.version.cuda is None:
            return [f"torch {torch.__version__} has no CUDA; install a CUDA build of torch"]
        if not torch.cuda.is_available():
            return ["torch sees no CUDA device; check nvidia-smi and CUDA_VISIBLE_DEVICES"]
        capability = torch.cuda.get_device_capability(index)
        if capability < OLDEST_CAPABILITY:
            return ["device has compute capability {}.{}, the kernels need 7.0".format(*capability)]
        if (missing := nvrtc_reason()) and any(kernel.find() is None for kernel in cubins(self.arch(index))):
            return [missing]
        return []

    @staticmethod
    def arch(device: torch.device | int | None = None) -> str:
        """The architecture that cubins are made for: 'sm_90'."""
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))

    def facts(self, device: torch.device) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(device)
        boot = Path("/proc/sys/kernel/random/boot_id")
        return {"host": boot.read_text().strip() if boot.exists() else socket.gethostname(), "host_name": socket.gethostname(),
                "name": str(getattr(properties, "uuid", device.index)), "index": device.index or 0,
                "capability": list(torch.cuda.get_device_capability(device))}

    def objections(self, facts: list[dict[str, Any]], rank: int) -> list[str]:
        own, reasons = facts[rank], []
        # A rank's number of a GPU means nothing to another, whose CUDA_VISIBLE_DEVICES may be its own: find the peer's GPU by its UUID.
        visible = {str(getattr(torch.cuda.get_device_properties(index), "uuid", index)): index
                   for index in range(torch.cuda.device_count())}
        for other, each in enumerate(facts):
            if each["host"] != own["host"]:
                return [f"rank {other} is on {each['host_name']} and this one on {own['host_name']}: their GPUs reach one another's memory "
                        "on one host only"]
            peer = visible.get(each["name"])             # None: not this process's to ask; making the memory will tell
            if each["name"] != own["name"] and peer is not None and not torch.cuda.can_device_access_peer(own["index"], peer):
                reasons.append(f"GPU {own['index']} does not reach the memory of rank {other}'s GPU {peer} (no NVLink, no PCIe peer "
                               "access; see nvidia-smi topo -p2p r)")
        return reasons

    def symmetric(self, base: Communicator, layout: Layout, facts: list[dict[str, Any]]) -> SymmetricMemory:
        return symmetric.make(base, layout, overlapping=len({each["name"] for each in facts}) < len(facts))

    def capture(self, device: torch.device) -> int:
        if not torch.cuda.is_current_stream_capturing():
            return 0
        return driver.capture_number(torch.cuda.current_stream(device).cuda_stream)

    def shared_bytes(self, device: torch.device) -> int:
        try:
            return driver.most_shared_bytes(device.index or 0)
        except driver.DriverError:
            return plan.SHARED_BYTES.get(torch.cuda.get_device_capability(device), 48 << 10)

    def prepare(self, kernels: list[KernelSource], device: torch.device) -> None:
        with torch.cuda.device(device):
            driver.make_current(device.index or 0)
            for kernel in kernels:
                self._function(kernel, device)

    def launch(
        self, kernel: KernelSource, grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int, call: bytes, device: torch.device
    ) -> None:
        """Raises BuildError where there is neither a cubin nor NVRTC, and DriverError."""
        with torch.cuda.device(device):
            driver.make_current(device.index or 0)
            self._function(kernel, device).launch(grid, block, shared_bytes, torch.cuda.current_stream(device).cuda_stream, call)

    def _function(self, kernel: KernelSource, device: torch.device) -> driver.Function:
        key = kernel, device.index
        with self._lock:
            if key not in self._functions:
                # What is asked for beyond 48 KB is a bound and costs nothing: ask for what the fused kernel may ever want.
                most = self.shared_bytes(device) - plan.STATIC_SHARED_BYTES if kernel.function.endswith("rms_norm") else 0
                self._functions[key] = driver.load(kernel.cubin(self.arch(device)).build().read_bytes(), kernel.function, most)
            return self._functions[key]
