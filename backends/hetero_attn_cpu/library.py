"""The built kernels of one instruction set: how they are compiled, loaded and called.

Loops run on the OpenMP runtime that torch has loaded already: the kernels get the address of its GOMP_parallel and are not linked with any
runtime, so that no second thread pool competes for the cores. Nothing is compiled before the first real use, and then it is said.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import shlex
from functools import cache
from pathlib import Path

import torch

from hetero_attn import in_flight
from hetero_attn.jit import BuildError, Kernel
from hetero_attn_cpu import abi
from hetero_attn_cpu.codec_calls import CodecCalls
from hetero_attn_cpu.instruction_sets import InstructionSet
from hetero_attn_cpu.shared_calls import SharedCalls

FLAGS_VARIABLE = "HETERO_ATTN_CPU_FLAGS"
SOURCES = (
    "cpu/attention_bf16.cpp", "cpu/attention_f16.cpp", "cpu/attention_f32.cpp", "cpu/attention.cpp", "cpu/linear.cpp",
    "cpu/norm.cpp", "cpu/shared_memory.cpp", "cpu/codec.cpp", "cpu/library.cpp",
)                                                    # the slowest to compile first: they are compiled side by side
# a * b + c is one rounding whatever compiler builds it; no errno from expf, no floating-point traps to keep in order; NaN and Inf as ever.
FLAGS = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
RUNTIMES = ("libgomp", "libomp", "libiomp5")         # each exports GOMP_parallel on Linux
log = logging.getLogger("hetero_attn")


class CallError(RuntimeError):
    """A kernel refused a call. The text says why."""


def kernel(each: InstructionSet, *, used_here: bool = True) -> Kernel:
    """The description of the object of an instruction set; nothing is compiled or loaded."""
    further = shlex.split(os.environ.get(FLAGS_VARIABLE, ""))
    links = tuple(flag for flag in further if flag.startswith("-fsanitize"))
    return Kernel(f"cpu-{each.name}", SOURCES, flags=(*FLAGS, *each.flags, *further), link_flags=links, abi_version=abi.ABI_VERSION,
                  arch=each.name, used_here=used_here)


class Library:
    """A loaded object. attention() and linear() take a packed struct (abi.py), whose memory the caller keeps alive; `shared` holds the
    functions of the shared-memory collectives, `codec` those of the low-bit codecs."""

    def __init__(self, object_: ctypes.CDLL, instruction_set: InstructionSet, parallel: int) -> None:
        """Raises BuildError if the object is not what its name says."""
        self.instruction_set = instruction_set
        self.parallel = parallel                     # address of GOMP_parallel; 0: the calling thread alone
        name, layout = object_.hetero_attn_cpu_instruction_set, object_.hetero_attn_cpu_layout
        name.restype, layout.restype, layout.argtypes = ctypes.c_char_p, ctypes.c_int64, (ctypes.c_int32,)
        found, expected = [layout(which) for which in range(4)], [abi.ABI_VERSION, abi.ATTENTION_BYTES, abi.LINEAR_BYTES, abi.NORM_BYTES]
        if found != expected:
            raise BuildError(f"kernel cpu-{instruction_set.name}: ABI version and struct sizes are {found}, expected {expected}; "
                             f"csrc/ and the package are of different versions: reinstall hetero-attn")
        if name().decode() != instruction_set.name:
            raise BuildError(f"kernel cpu-{instruction_set.name}: the compiler made {name().decode()!r} of it; name another by CXX")
        self.shared = SharedCalls(object_)
        self.codec = CodecCalls(object_)
        self._attention, self._linear = object_.hetero_attn_cpu_attention, object_.hetero_attn_cpu_linear
        self._norm = object_.hetero_attn_cpu_rms_norm
        for function in (self._attention, self._linear, self._norm):
            function.argtypes, function.restype = (ctypes.c_char_p,), ctypes.c_int
        share = object_.hetero_attn_cpu_share_processor
        share.argtypes, share.restype = (ctypes.c_int32,), None
        in_flight.watch(share)

    def attention(self, packed: bytes) -> None:
        """Run an HaAttention. Raises CallError, and MemoryError."""
        status = self._attention(packed)             # ctypes lets other Python threads run meanwhile
        if status:
            self._refused("attention", status)

    def linear(self, packed: bytes) -> None:
        """Run an HaLinear. Raises CallError, and MemoryError."""
        status = self._linear(packed)
        if status:
            self._refused("linear", status)

    def rms_norm(self, packed: bytes) -> None:
        """Run an HaNorm. Raises CallError, and MemoryError."""
        status = self._norm(packed)
        if status:
            self._refused("rms_norm", status)

    def _refused(self, what: str, status: int) -> None:
        text = f"cpu kernels ({self.instruction_set.name}): {what}: {abi.STATUS.get(status, f'status {status}')}"
        raise MemoryError(text) if status == 2 else CallError(text)


def load(each: InstructionSet) -> Library:
    """The kernels of an instruction set that this CPU has: ready ones, else compiled now. Raises BuildError."""
    steps = itertools.count()

    def tell(step: str) -> None:                     # at the first step alone: without a compiler there is none, and nothing to tell
        if next(steps) == 0:
            log.warning("building the CPU kernels for %s, once: this takes some seconds (`hetero-attn build` does it ahead)", each.name)

    return Library(kernel(each).load(progress=tell), each, parallel_function())


@cache
def parallel_function() -> int:
    """The address of GOMP_parallel in the OpenMP runtime that torch's own kernels use; 0 where torch has none with that name.

    Looked up among libtorch_cpu's dependencies, which is where torch's calls go even if a process holds several runtimes.
    """
    mode = getattr(os, "RTLD_NOLOAD", None)
    if mode is None:
        return 0
    libraries = [*(Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"), *_loaded_runtimes()]
    for path in libraries:
        try:
            return ctypes.cast(ctypes.CDLL(str(path), mode=mode | os.RTLD_LAZY).GOMP_parallel, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            continue
    return 0


def _loaded_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes in this process, in the order of their addresses; [] where the system does not tell."""
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = dict.fromkeys(line.split(maxsplit=5)[5] for line in mapped if line.count(" ") and "/" in line)
    return [path for path in paths if Path(path).name.startswith(RUNTIMES)]
