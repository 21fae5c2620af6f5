"""What this machine reaches at most: fp32 GEMM by torch, reading by a loop that does nothing else, multiply-adds on registers.

Bandwidth drifts from minute to minute on shared machines, so these are not constants of a run: each table cell takes its own reading,
in the same rounds as the contenders. torch's GEMM is not the last word everywhere (on AMD its BLAS leaves half of AVX-512 unused), so
the multiply-add peak stands beside it. The read loop is built with the system compiler; without one torch's sum stands in, which is slower.
"""

from __future__ import annotations

import ctypes
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from hetero_attn import host_memory

GEMM_SIZE = 2048
READ_AT_LEAST = 256 << 20           # bytes a timed reading covers at least, so that starting its threads does not show
READ_IN_TURNS = 32 << 20
VARIANTS = ((1, 0), (1, 1024), (4, 0), (4, 1024))       # (streams, bytes prefetched ahead) of the read loop


@cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "probes.so"
        source = Path(__file__).with_name("probes.cpp")
        subprocess.run([compiler, "-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC", "-pthread",
                        "-o", built, source], check=True)
        library = ctypes.CDLL(str(built))
    library.read_seconds.restype = library.fma_flops.restype = ctypes.c_double
    library.read_seconds.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_size_t]
    library.fma_flops.argtypes = [ctypes.c_int, ctypes.c_long]
    return library


class ReadProbe:
    """Reads a buffer of `nbytes`, or the memory of dense tensors, again and again with torch's number of threads: from the caches if it
    fits there, else from memory."""

    def __init__(self, nbytes: int = 0, tensors: Sequence[torch.Tensor] = ()):
        self._buffers = list(tensors) or [host_memory.empty((-(-nbytes // 512) * 64,), torch.int64).fill_(1)]       # 8 bytes each, touched
        self.nbytes = sum(each.nbytes // 512 * 512 for each in self._buffers)
        self._repeats = max(1, READ_AT_LEAST // self.nbytes)
        self._variant = VARIANTS[0]
        if _library() is not None:
            self._variant = max(VARIANTS, key=lambda variant: statistics.median(self._rate(variant) for _ in range(3)))

    def __call__(self) -> float:
        """Bytes a second, now."""
        return self._rate(self._variant)

    def _rate(self, variant: tuple[int, int]) -> float:
        library = _library()
        if library is None:
            start = time.perf_counter()
            for _ in range(self._repeats):
                for each in self._buffers:
                    each.sum()
            return self._repeats * self.nbytes / (time.perf_counter() - start)
        threads = torch.get_num_threads()
        # One after the other where that is no matter of microseconds: a large buffer read again and again may stay in a cache that all of
        # them do not fit.
        rounds, repeats = (self._repeats, 1) if self.nbytes >= READ_IN_TURNS else (1, self._repeats)
        seconds = sum(library.read_seconds(each.data_ptr(), each.nbytes // 512 * 512, threads, repeats, *variant)
                      for _ in range(rounds) for each in self._buffers)
        return self._repeats * self.nbytes / seconds


class GemmProbe:
    """torch's fp32 product of two square matrices, the shape BLAS is best at."""

    def __init__(self, size: int = GEMM_SIZE):
        self._a, self._b, self._out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
        self._flops = 2 * size**3
        self()

    def __call__(self) -> float:
        """Operations a second, now."""
        start = time.perf_counter()
        torch.mm(self._a, self._b, out=self._out)
        return self._flops / (time.perf_counter() - start)


def fma_peak() -> float | None:
    """fp32 operations a second with all operands in registers, the best of twenty; None without a compiler."""
    library = _library()
    return None if library is None else max(library.fma_flops(torch.get_num_threads(), 10_000_000) for _ in range(20))
