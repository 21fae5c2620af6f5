"""How a kernel gets onto the device: Triton compiles and launches it on torch's current stream.

A launcher says on which torch device type it runs and why it cannot here; tests put Triton's interpreter in its place, which runs the same
kernels on CPU tensors. Triton is imported only once torch sees a device: importing this package stays light.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch

from hetero_attn_triton.tiling import Device, Tile
from hetero_attn_triton.tuned_tiles import load_tuned

UNCOMPILED = {"CompilationError", "CompileTimeAssertionFailure", "UnsupportedLanguageConstruct", "PTXASError"}    # Triton's, by name
UNCOMPILED_WORDS = ("PassManager::run failed", "failed to translate module to LLVM IR", "LLVM Translation failed")
INSTALL = "pip install 'hetero-attn[triton]' (triton)"
OLDEST = (3, 4)                                    # of triton
OLDEST_CAPABILITY = (8, 0)                         # below it Triton has no bf16 products, and no asynchronous copies


class DoesNotCompile(RuntimeError):
    """Triton's compiler failed on a kernel. Nothing was launched, so another backend may take the call."""


class TooLarge(DoesNotCompile):
    """It compiled, and asks for more shared memory or registers than the device has: a smaller tile may do."""


def told_apart(error: Exception) -> Exception:
    """The error as one of the two above where nothing has reached the device, else as it is."""
    name, text = type(error).__name__, " ".join(str(error).split())
    if name == "OutOfResources":
        return TooLarge(text)
    if name in UNCOMPILED or any(words in text for words in UNCOMPILED_WORDS):
        return DoesNotCompile(f"{name}: {text[-300:]}")
    return error


class Launcher(Protocol):
    """device: the torch device type whose tensors it takes. probes: try a tiny call before saying that it runs."""

    device: str
    probes: bool

    def unavailable_reasons(self, index: int | None = None) -> list[str]:
        """Of a device of this type by its number, None = the current one."""

    def hardware(self, device: torch.device) -> Device: ...

    def tuned(self, device: torch.device) -> dict[str, Tile]: ...

    def launch(self, kernel: str, programs: int, arguments: tuple, constants: dict[str, Any], warps: int, stages: int,
               device: torch.device, *, exact: bool = False) -> None:
        """Enqueue `programs` programs of one of `kernels()` behind what the calling thread's stream holds. exact: products are rounded
        before they are added to anything."""


@cache
def kernels() -> dict[str, Any]:
    """Kernel name -> Triton's function. Imports triton."""
    from hetero_attn_triton import attention_kernel, codec_kernel, combine_kernel, norm_kernel

    codec = ("pack_groups", "unpack_groups", "row_factors", "pack_outliers", "pack_features", "unpack_features")
    return {
        "attention": attention_kernel.attention_forward, "combine": combine_kernel.attention_combine,
        "rms_norm": norm_kernel.rms_norm_kernel, "add_rms_norm": norm_kernel.add_rms_norm_kernel,
        **{name: getattr(codec_kernel, f"{name}_kernel") for name in codec},
    }


def triton_reasons(find: Callable[[str], Any] = importlib.util.find_spec) -> list[str]:
    """Why triton does not serve here; [] = it imports and is new enough."""
    if find("triton") is None:
        return [f"triton is not installed; {INSTALL}"]
    try:
        import triton
    except Exception as error:
        return [f"triton does not import ({type(error).__name__}: {error}); {INSTALL}"]
    version = getattr(triton, "__version__", "unknown")
    try:
        known = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        return [f"triton says that its version is {version}, expected {'.'.join(map(str, OLDEST))} or later; {INSTALL}"]
    if known < OLDEST:
        return [f"triton is {version}, the kernels need {'.'.join(map(str, OLDEST))} or later; {INSTALL}"]
    return []


class GpuLauncher:
    """CUDA and ROCm devices, as torch presents both: device type cuda."""

    device = "cuda"
    probes = True

    def __init__(self) -> None:
        self._hardware: dict[int, Device] = {}
        self._tuned: dict[int, dict[str, Tile]] = {}

    def unavailable_reasons(self, index: int | None = None) -> list[str]:
        """A device first, since most machines without one have no triton either. Imports triton only where there is one."""
        if torch.version.cuda is None and torch.version.hip is None:
            return [f"torch {torch.__version__} has neither CUDA nor ROCm; install a build of torch for your GPU"]
        if not torch.cuda.is_available():
            return ["torch sees no GPU; check nvidia-smi (or rocm-smi) and CUDA_VISIBLE_DEVICES"]
        capability = torch.cuda.get_device_capability(index)
        if torch.version.hip is None and capability < OLDEST_CAPABILITY:
            return [f"device has compute capability {capability[0]}.{capability[1]}, Triton's kernels need 8.0 (bf16 products); "
                    f"use backend 'volta' (7.0) or 'sdpa'"]
        return triton_reasons()

    def hardware(self, device: torch.device) -> Device:
        """What the driver says of the device."""
        index = torch.cuda.current_device() if device.index is None else device.index
        if index not in self._hardware:
            facts = torch.cuda.get_device_properties(index)
            shared = getattr(facts, "shared_memory_per_block_optin", 0) or getattr(facts, "shared_memory_per_block", 0)
            nvidia = torch.version.hip is None
            rows = 32 if nvidia and facts.major == 10 else 128
            self._hardware[index] = Device(facts.multi_processor_count, shared or 65536, nvidia and facts.major == 9, rows)
        return self._hardware[index]

    def tuned(self, device: torch.device) -> dict[str, Tile]:
        """What was measured on this kind of device; read once a process."""
        index = torch.cuda.current_device() if device.index is None else device.index
        if index not in self._tuned:
            self._tuned[index] = load_tuned(torch.cuda.get_device_name(index))
        return self._tuned[index]

    def launch(self, kernel: str, programs: int, arguments: tuple, constants: dict[str, Any], warps: int, stages: int,
               device: torch.device, *, exact: bool = False) -> None:
        """Raises DoesNotCompile, and TooLarge for what fits no multiprocessor."""
        try:
            with torch.cuda.device(device):
                kernels()[kernel][(programs,)](*arguments, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=not exact)
        except Exception as error:
            if (told := told_apart(error)) is error:
                raise
            raise told from error
