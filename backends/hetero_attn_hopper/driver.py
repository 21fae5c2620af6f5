"""The CUDA driver through ctypes: load a cubin, find its kernel, launch it on a stream that torch owns.

Nothing else is needed where torch has a GPU: no CuPy, whose builds are tied to one CUDA version each, and no compiler. Errors are the
driver's own words. (docs.nvidia.com, CUDA Driver API: cuModuleLoadData, cuModuleGetFunction, cuFuncSetAttribute, cuLaunchKernel.)
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

LIBRARIES = ("libcuda.so.1", "nvcuda.dll")
MAX_DYNAMIC_SHARED_BYTES = 8                         # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
ATTRIBUTE_SHARED_BYTES = 97                          # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
CAPTURING = 1                                        # CU_STREAM_CAPTURE_STATUS_ACTIVE
WITHOUT_ASKING = 48 << 10                            # bytes of dynamic shared memory; beyond them a kernel has to ask


class DriverError(RuntimeError):
    """A driver call failed. The text holds the call and the driver's words."""


@cache
def library() -> ctypes.CDLL:
    """The driver. Raises DriverError where there is none."""
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise DriverError(f"the CUDA driver ({LIBRARIES[0]}) does not load; install the GPU's driver")


def check(status: int, call: str) -> None:
    """Raise DriverError unless a call succeeded."""
    if status:
        text = ctypes.c_char_p()
        library().cuGetErrorString(status, ctypes.byref(text))
        raise DriverError(f"{call}: {(text.value or b'unknown error').decode()} (code {status})")


def make_current(index: int) -> None:
    """A context for this thread, where it has none: a thread that torch has not used yet. Raises DriverError."""
    context, device = ctypes.c_void_p(), ctypes.c_int()
    check(library().cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    if not context.value:
        check(library().cuDeviceGet(ctypes.byref(device), ctypes.c_int(index)), "cuDeviceGet")
        check(library().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
        check(library().cuCtxSetCurrent(context), "cuCtxSetCurrent")


@dataclass(frozen=True)
class Function:
    """A kernel on the device that was current when it was loaded."""

    handle: ctypes.c_void_p
    name: str

    def launch(self, grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int, stream: int, call: bytes) -> None:
        """Enqueue it with `call` as its one argument, by value. Raises DriverError."""
        sizes = [*(*grid, 1, 1)[:3], *(*block, 1, 1)[:3]]
        argument = ctypes.create_string_buffer(call, len(call))
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        status = library().cuLaunchKernel(self.handle, *map(ctypes.c_uint, sizes), ctypes.c_uint(shared_bytes), ctypes.c_void_p(stream),
                                          arguments, None)
        check(status, f"cuLaunchKernel {self.name}, grid {list(grid)}, block {list(block)}, {shared_bytes} B shared")


def load(cubin: bytes, name: str, shared_bytes: int) -> Function:
    """A kernel of a cubin, allowed so much dynamic shared memory, for the context that is current. Raises DriverError."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    check(library().cuModuleLoadData(ctypes.byref(module), cubin), f"cuModuleLoadData for {name}")
    check(library().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"cuModuleGetFunction {name}")
    if shared_bytes > WITHOUT_ASKING:
        check(library().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_BYTES, ctypes.c_int(shared_bytes)),
              f"cuFuncSetAttribute {name} {shared_bytes} B shared")
    return Function(function, name)


def capture_number(stream: int) -> int:
    """The driver's number of the capture that a stream is in, 0 = none (cuStreamGetCaptureInfo_v2). Raises DriverError."""
    state, number = ctypes.c_int(), ctypes.c_ulonglong()
    check(library().cuStreamGetCaptureInfo_v2(ctypes.c_void_p(stream), ctypes.byref(state), ctypes.byref(number), None, None, None),
          "cuStreamGetCaptureInfo")
    return number.value if state.value == CAPTURING else 0


def most_shared_bytes(index: int) -> int:
    """The most shared memory of a block of a device. Raises DriverError."""
    device, value = ctypes.c_int(), ctypes.c_int()
    check(library().cuDeviceGet(ctypes.byref(device), ctypes.c_int(index)), "cuDeviceGet")
    check(library().cuDeviceGetAttribute(ctypes.byref(value), ctypes.c_int(ATTRIBUTE_SHARED_BYTES), device), "cuDeviceGetAttribute")
    return value.value
