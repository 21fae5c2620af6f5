"""How a kernel gets onto the device: CuPy launches a cubin on torch's current stream; tests put csrc/simt's executor in its place.

A launcher says on which torch device type it runs and why it cannot here. The cubin comes prebuilt, from the cache, or from NVRTC 12
(hetero_attn/cubin.py): CuPy itself compiles nothing.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

import torch

from hetero_attn.cubin import KernelSource, nvrtc_reason
from hetero_attn_volta.kernels import cubins

CUPY = "pip install 'hetero-attn[cuda12]' (cupy-cuda12x)"
OLDEST_CAPABILITY = (7, 0)


class Launcher(Protocol):
    """What runs kernels. device: the torch device type whose tensors it takes. probes: try a tiny call before saying that it runs."""

    device: str
    probes: bool

    def unavailable_reasons(self, index: int | None = None) -> list[str]:
        """Of a device of this type by its number, None = the current one."""

    def launch(
        self, kernel: KernelSource, grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int, call: bytes, device: torch.device
    ) -> None:
        """Enqueue one kernel with `call` as its one argument, by value, behind what the calling thread's stream holds."""


class CudaLauncher:
    """Through CuPy, on torch tensors and torch's current stream."""

    device = "cuda"
    probes = True

    def __init__(self) -> None:
        self._functions: dict[tuple, Any] = {}
        self._lock = threading.Lock()

    def unavailable_reasons(self, index: int | None = None) -> list[str]:
        """Driver, torch build, architecture, CuPy, and a cubin or NVRTC. Imports CuPy only where torch sees a device."""
        if torch.version.hip:
            return ["torch is a ROCm build, these kernels are CUDA's; use backend 'sdpa'"]
        if torch.version.cuda is None:
            return [f"torch {torch.__version__} has no CUDA; a V100 needs a build for CUDA 12.6: install torch's cu126 wheel"]
        if not torch.cuda.is_available():
            return ["torch sees no CUDA device; check nvidia-smi and CUDA_VISIBLE_DEVICES"]
        reasons = [*torch_build_reasons(torch.version.cuda, torch.cuda.get_arch_list(), torch.cuda.get_device_capability(index))]
        try:
            import cupy
        except Exception as error:
            return [*reasons, f"CuPy does not import ({type(error).__name__}: {error}); {CUPY}"]
        runtime = cupy.cuda.runtime.runtimeGetVersion()
        if runtime // 1000 != 12:
            reasons.append(f"CuPy is built for CUDA {runtime // 1000}, expected 12 (13 has no sm_70); {CUPY}")
        if (missing := nvrtc_reason()) and any(cubin.find() is None for cubin in cubins(self.arch(index))):
            reasons.append(missing)
        return reasons

    @staticmethod
    def arch(device: torch.device | int | None = None) -> str:
        """The architecture that cubins are made for: 'sm_70'."""
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))

    def launch(
        self, kernel: KernelSource, grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int, call: bytes, device: torch.device
    ) -> None:
        """Raises BuildError where there is neither a cubin nor NVRTC, and CuPy's CUDADriverError."""
        import cupy
        import numpy

        with torch.cuda.device(device):
            function = self._function(kernel, shared_bytes, device)
            stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, device.index or 0)
            with stream:
                function(grid, block, (numpy.frombuffer(bytearray(call), dtype=[("call", f"V{len(call)}")]),), shared_mem=shared_bytes)

    def _function(self, kernel: KernelSource, shared_bytes: int, device: torch.device) -> Any:
        import cupy

        key = (kernel, device.index)
        with self._lock:
            if key not in self._functions:
                module = cupy.RawModule(path=str(kernel.cubin(self.arch(device)).build()))
                function = module.get_function(kernel.function)
                if shared_bytes > 48 << 10:                       # beyond 48 KB a kernel has to ask
                    function.max_dynamic_shared_size_bytes = shared_bytes
                self._functions[key] = function
            return self._functions[key]


def torch_build_reasons(cuda: str, arches: list[str], capability: tuple[int, int]) -> list[str]:
    """Why torch, built for CUDA `cuda` with kernels for `arches`, cannot serve a device of this capability; [] = it can."""
    if capability < OLDEST_CAPABILITY:
        return [f"device has compute capability {capability[0]}.{capability[1]}, kernels need 7.0 (tensor cores); use backend 'sdpa'"]
    if capability < (7, 5) and arches and "sm_70" not in arches:
        return [f"torch is built for CUDA {cuda} without sm_70 (wheels for CUDA 12.8 from torch 2.11 on, and all for CUDA 13, dropped it); "
                f"a V100 needs a build for CUDA 12.6: install torch's cu126 wheel"]
    return []
