"""Run CUDA sources on the CPU: every thread of a block a fiber, with checks and counters that a GPU does not have (csrc/simt).

A Program is one .cu, compiled by the system's C++ compiler. Its launches fail on divergence at a warp operation or barrier, deadlock, and
use of shared memory beyond what was asked for; unwritten shared memory is NaN. A counted Program moreover checks every access (alignment,
bounds, races between barriers) and counts bank conflicts, global-memory sectors and instructions. Tests and benchmarks only: it is slow.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from hetero_attn.jit import Kernel, compiler_reason, csrc_dir

ABI_VERSION = 2
COUNTERS = ("mma", "shuffle", "vote", "syncwarp", "barrier", "special", "atomic", "switches")       # csrc/simt/runtime.h's Counter
SPACES, DIRECTIONS, WIDTHS = ("shared", "global"), ("load", "store"), (1, 2, 4, 8, 16)
ORDERS = (0, 1, 2, 3)                  # ascending, descending, a step a warp in turn, shuffled; above 3 further shuffles
TIME_LIMIT_S = 120.0
ERROR_BYTES = 4096
DECLARED = re.compile(r"""extern\s+__shared__\s+(?:__align__\(\w+\)\s+)?([\w ]+?)\s+(\w+)\s*\[\s*\]""")
KERNEL = re.compile(r"""extern\s+"C"\s+__global__\s+(?:void\s+)?(?:__launch_bounds__\([^)]*\)+\s+)?(?:void\s+)?(\w+)\s*\(""")


class SimtError(RuntimeError):
    """A launch broke a rule. The text names the block, the threads, and the places in the source."""


class _Options(ctypes.Structure):      # csrc/simt/runtime.h's Options
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3), ("shared_bytes", ctypes.c_uint64), ("workers", ctypes.c_int32),
        ("order", ctypes.c_int32), ("resident", ctypes.c_int32), ("counted", ctypes.c_int32), ("time_limit_s", ctypes.c_double),
        ("cancelled", ctypes.c_void_p), ("regions", ctypes.c_void_p), ("region_count", ctypes.c_int32), ("agent", ctypes.c_int32),
        ("stall_barrier", ctypes.c_int32), ("stall_s", ctypes.c_double),
    ]


@dataclass(frozen=True)
class Traffic:
    """What the accesses of one kind came to, summed over a launch. A request is one load or store of a warp.

    Shared memory: wavefronts are passes over the banks, ideal_wavefronts what the same requests take without conflicts. Global memory:
    sectors of 32 bytes and lines of 128 touched, ideal_sectors the fewest that hold as many different bytes.
    """

    requests: int = 0
    bytes: int = 0
    wavefronts: int = 0
    ideal_wavefronts: int = 0
    sectors: int = 0
    ideal_sectors: int = 0
    lines: int = 0

    @property
    def conflicts(self) -> int:
        return self.wavefronts - self.ideal_wavefronts

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(a + b for a, b in zip(self.values(), other.values())))

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(*(a - b for a, b in zip(self.values(), other.values())))

    def values(self) -> tuple[int, ...]:
        return (self.requests, self.bytes, self.wavefronts, self.ideal_wavefronts, self.sectors, self.ideal_sectors, self.lines)


@dataclass(frozen=True)
class Counts:
    """What a launch did. instructions: warp operations by name (COUNTERS; `barrier` a block's, `special` and `atomic` a thread's).

    traffic: (space, direction, width in bytes) -> Traffic, and regions: (name, direction) -> Traffic; empty unless the program is counted.
    """

    instructions: Mapping[str, int]
    traffic: Mapping[tuple[str, str, int], Traffic] = field(default_factory=dict)
    regions: Mapping[tuple[str, str], Traffic] = field(default_factory=dict)

    def total(self, space: str, direction: str | None = None, width: int | None = None) -> Traffic:
        """The traffic of a space, of a direction and of an access width (None = all of them)."""
        return sum((traffic for (s, d, w), traffic in self.traffic.items()
                    if s == space and direction in (None, d) and width in (None, w)), Traffic())


@cache
def _runtime(sanitize: bool) -> ctypes.CDLL:
    """The executor, loaded so that programs find its functions. Raises BuildError."""
    flags = ("-fsanitize=address",) if sanitize else ()
    kernel = Kernel("simt-runtime" + "-asan" * sanitize, ("simt/runtime.cpp",), flags=(*flags, *processor_flags(), "-pthread"),
                    abi_version=ABI_VERSION, used_here=False)
    return ctypes.CDLL(str(kernel.build()), mode=ctypes.RTLD_GLOBAL)


@cache
def processor_flags() -> tuple[str, ...]:
    """Flags for what makes half precision quick on this CPU, where it has it: nothing else depends on them."""
    try:
        features = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    except (OSError, IndexError):
        return ()
    return ("-mf16c", "-mavx2", "-mfma") if {"f16c", "avx2", "fma"} <= set(features) else ()


@dataclass(frozen=True)
class Program:
    """A .cu, by its path (under csrc/, or absolute), with preprocessor definitions.

    counted: instrument it, for counts and for the checks of accesses. sanitize: with AddressSanitizer, in a process that preloads it.
    """

    source: str | Path
    defines: tuple[tuple[str, str | int], ...] = ()
    counted: bool = False
    sanitize: bool = False

    @cached_property
    def path(self) -> Path:
        return csrc_dir() / self.source

    @cached_property
    def kernel_names(self) -> list[str]:
        names = KERNEL.findall(self._whole)
        if not names:
            raise ValueError(f'{self.path}: expected at least one kernel, declared as extern "C" __global__ void name(…)')
        return names

    @cached_property
    def _files(self) -> list[tuple[str, bytes]]:
        return Kernel("source", (str(self.path),), abi_version=ABI_VERSION)._files()

    @cached_property
    def _whole(self) -> str:
        """The source with all that it includes, comments taken out."""
        return re.sub(r"//[^\n]*|/\*.*?\*/", "", "\n".join(content.decode() for _, content in self._files), flags=re.DOTALL)

    @cached_property
    def kernel(self) -> Kernel:
        """The native object, for those who want to build many side by side."""
        digest = hashlib.sha256(repr([content for _, content in self._files]).encode()).hexdigest()[:24]
        flags = [f'-DSIMT_SOURCE="{self.path}"', f"-DSIMT_KERNELS={' '.join(f'SIMT_KERNEL({name})' for name in self.kernel_names)}",
                 f"-DSIMT_SOURCE_DIGEST={digest}", "-w", *processor_flags(), "-fno-strict-aliasing"]
        declared = set(DECLARED.findall(self._whole))
        if len(declared) > 1:
            raise ValueError(f"{self.path}: declares its dynamic shared memory in {len(declared)} ways, expected one: {sorted(declared)}")
        for type_, name in declared:
            flags += [f"-DSIMT_DYNAMIC_TYPE={type_}", f"-DSIMT_DYNAMIC_NAME={name}"]
        flags += [f"-D{name}={value}" for name, value in self.defines]
        if self.counted:                  # one load or store in the source stays one in the code
            flags += ["-DSIMT_COUNTED", "-fsanitize=thread", "-O1", "-fno-tree-sra", "-fno-store-merging", "-fno-tree-vectorize"]
        elif self.sanitize:
            flags += ["-fsanitize=address", "-O1", "-fno-omit-frame-pointer"]
        else:
            flags += ["-O2"]
        kind = "-counted" * self.counted + "-asan" * self.sanitize
        settings = "".join(f"-{value}" for _, value in self.defines if re.fullmatch(r"\w+", str(value)))
        link = ("-fsanitize=address",) if self.sanitize else ("-fno-sanitize=thread",) if self.counted else ()      # without its library
        return Kernel(f"simt-{Path(self.source).stem}{settings}{kind}"[:100], ("simt/program.cpp",), flags=tuple(flags),
                      link_flags=link, abi_version=ABI_VERSION, used_here=False)

    @cached_property
    def _library(self) -> ctypes.CDLL:
        _runtime(self.sanitize)
        return ctypes.CDLL(str(self.kernel.build()))

    def launch(
        self, name: str, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], *, shared_bytes: int = 0, order: int = 0,
        workers: int | None = None, resident: bool = False, regions: Mapping[str, tuple[int, int]] | None = None,
        time_limit_s: float = TIME_LIMIT_S, cancelled: ctypes.c_int32 | None = None, agent: int | None = None, stall_s: float = 0.0,
        stall_barrier: int = 0,
    ) -> Counts:
        """Run one kernel. grid and block: up to three sizes. arguments: tensors (their address), ints (32 bits), floats (32 bits), and
        ctypes values or bytes for everything else (a struct by value, a 64-bit number).

        order: how threads take turns (ORDERS). resident: all blocks at once, as blocks that wait for one another need it. regions: name ->
        (begin, end) bytes of the dynamic shared memory to count apart. time_limit_s: for threads that spin. agent: memory at system scope
        is weak, and this is the launch of that rank (csrc/simt/weak_memory.h). stall_s: how long each block sleeps at its end, before its
        last stores are seen, and behind its barrier number stall_barrier (1, 2, …). Raises SimtError, BuildError.
        """
        if name not in self.kernel_names:
            raise ValueError(f"kernel is {name!r}, {self.path.name} has {', '.join(self.kernel_names)}")
        library, regions = self._library, dict(regions or {})
        held = [_argument(value) for value in arguments]
        pointers = (ctypes.c_void_p * max(1, len(held)))(*(ctypes.addressof(value) for value in held))
        bounds = (ctypes.c_uint32 * (2 * max(1, len(regions))))(*(edge for pair in regions.values() for edge in pair))
        options = _Options(_sizes("grid", grid), _sizes("block", block), shared_bytes, workers or len(os.sched_getaffinity(0)), order,
                           resident, self.counted, time_limit_s, None if cancelled is None else ctypes.addressof(cancelled),
                           ctypes.addressof(bounds), len(regions), -1 if agent is None else agent, stall_barrier, stall_s)
        threads = options.block[0] * options.block[1] * options.block[2]
        if not 0 < threads <= 1024:
            raise ValueError(f"block is {tuple(block)}: {threads} threads, expected 1 to 1024")
        kinds = [(s, d, w) for s in (*SPACES, "other") for d in DIRECTIONS for w in WIDTHS]
        fields = len(Traffic().values())
        counters, traffic = (ctypes.c_uint64 * len(COUNTERS))(), (ctypes.c_uint64 * (len(kinds) * fields))()
        apart = (ctypes.c_uint64 * (2 * fields * max(1, len(regions))))()
        error = ctypes.create_string_buffer(ERROR_BYTES)
        entry, find = getattr(library, f"simt_entry_{name}"), library.simt_find_shared
        failed = _runtime(self.sanitize).simt_launch(entry, find, ctypes.byref(options), pointers, counters, traffic, apart, error,
                                                     ctypes.c_size_t(ERROR_BYTES))
        if failed:
            raise SimtError(f"{name}: {error.value.decode(errors='replace')}")
        part = lambda array, i: Traffic(*array[i * fields : (i + 1) * fields])
        by_kind = {kind: part(traffic, i) for i, kind in enumerate(kinds) if kind[0] in SPACES and traffic[i * fields]}
        by_region = {(region, d): part(apart, 2 * r + i) for r, region in enumerate(regions) for i, d in enumerate(DIRECTIONS)}
        return Counts(dict(zip(COUNTERS, counters)), by_kind, by_region if self.counted else {})


class SimtLauncher:
    """A backend's launcher that runs its CUDA kernels here, on CPU tensors: planning, checks and kernels are the device's own.

    order, counted, sanitize, workers, regions: as Program and launch() take them. root: where the sources are, in place of csrc/ (seeded
    faults). `launched` keeps what was launched last, newest at the end: (function, Counts).
    """

    device = "cpu"
    probes = False

    def __init__(self, *, order: int = 0, counted: bool = False, sanitize: bool = False, workers: int | None = None,
                 root: Path | None = None) -> None:
        self.order, self.counted, self.sanitize, self.workers, self.root = order, counted, sanitize, workers, root
        self.regions: dict[str, tuple[int, int]] = {}
        self.launched: deque[tuple[str, Counts]] = deque(maxlen=64)
        self._programs: dict[Any, Program] = {}

    def unavailable_reasons(self, index: int | None = None) -> list[str]:
        reason = compiler_reason()
        return [f"the executor needs a C++ compiler: {reason}"] if reason else []

    def program(self, kernel: Any) -> Program:
        """The program of a kernel: anything with source, function, name and defines."""
        key = kernel, self.counted, self.sanitize
        if key not in self._programs:
            source = kernel.source if self.root is None else self.root / kernel.source
            self._programs[key] = Program(source, kernel.defines, counted=self.counted, sanitize=self.sanitize)
        return self._programs[key]

    def launch(self, kernel: Any, grid: Sequence[int], block: Sequence[int], shared_bytes: int, call: bytes, device: torch.device) -> None:
        counts = self.program(kernel).launch(kernel.function, grid, block, [call], shared_bytes=shared_bytes, order=self.order,
                                             workers=self.workers, regions=self.regions)
        self.launched.append((kernel.function, counts))


def host_write(agent: int, to: torch.Tensor, values: torch.Tensor) -> None:
    """Write values into `to` (contiguous, of one size) as an earlier kernel of that agent would: others see it once it is released to
    them."""
    if to.nbytes != values.nbytes or not (to.is_contiguous() and values.is_contiguous()):
        raise ValueError(f"host_write: {list(values.shape)} into {list(to.shape)}, expected contiguous tensors of one size")
    _runtime(False).simt_host_write(agent, ctypes.c_void_p(to.data_ptr()), ctypes.c_void_p(values.data_ptr()), ctypes.c_uint64(to.nbytes))


def forget() -> None:
    """Everything stored so far is seen by everyone: between two tests of weak memory."""
    _runtime(False).simt_forget()


def run_ranks(launches: Sequence[Callable[[ctypes.c_int32], Any]], *, names: Sequence[str] | None = None) -> list[Any]:
    """Run launches at once, each on a thread, as the ranks of a node: they may share buffers and spin on what the others write.

    Each is called with a flag to hand on as Program.launch(…, cancelled=flag): when one rank fails the others give up instead of spinning
    on. Returns their results in order. Raises the first failure, with the rank's name.
    """
    cancelled, lock = ctypes.c_int32(0), threading.Lock()
    results: list[Any] = [None] * len(launches)
    failures: list[tuple[int, BaseException]] = []

    def run(rank: int) -> None:
        try:
            results[rank] = launches[rank](cancelled)
        except BaseException as error:
            with lock:
                failures.append((rank, error))
            cancelled.value = 1

    threads = [threading.Thread(target=run, args=(rank,), name=f"simt-rank-{rank}") for rank in range(len(launches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        rank, error = failures[0]
        raise SimtError(f"{names[rank] if names else f'rank {rank}'}: {error}") from error
    return results


def _argument(value: Any) -> ctypes._SimpleCData | ctypes.Array | ctypes.Structure:
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise ValueError(f"argument is a tensor on {value.device}, the executor runs on the cpu")
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, bool | int):
        return ctypes.c_int32(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, bytes):
        return ctypes.create_string_buffer(value, len(value))
    if isinstance(value, ctypes._SimpleCData | ctypes.Structure | ctypes.Array):
        return value
    raise TypeError(f"argument is {type(value).__name__}, expected a tensor, int, float, bytes or ctypes value")


def _sizes(name: str, sizes: Sequence[int]) -> ctypes.Array:
    full = (*sizes, 1, 1, 1)[:3]
    if len(sizes) > 3 or any(size < 1 for size in sizes):
        raise ValueError(f"{name} is {tuple(sizes)}, expected one to three sizes of at least 1")
    return (ctypes.c_uint32 * 3)(*full)
