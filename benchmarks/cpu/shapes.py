"""The six attention shapes, what each must cost at least, and the figures that others reach on them.

Pure arithmetic, so that what a limit is can be tested without a clock. Work is counted exactly: a causal call does the products of
its visible pairs and no others, and a decode call must read every byte of K and V once. The figures of peers are those of one machine
(ZEN3 below); a run on another machine compares with them and with the peers it measures itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DTYPES = ("float32", "float16", "bfloat16")
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
ZEN3 = "2 cores AMD Zen 3 (AVX2), 190 GFLOP/s fp32, 42 GB/s"


@dataclass(frozen=True)
class Shape:
    """One call: q [B, Hq, Sq, D], k and v [B, Hkv, Skv, D]; window is the number of keys left of a query's own, -1 unlimited."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    causal: bool = False
    window: int = -1

    @property
    def decode(self) -> bool:
        return self.q_len == 1

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of one head, causal and window bottom-right."""
        return visible_pairs(self.q_len, self.kv_len, self.causal, self.window)

    @property
    def flops(self) -> int:
        """Two products of 2 * D operations for each visible pair of each query head."""
        return 4 * self.batch * self.q_heads * self.pairs * self.head_dim

    def kv_bytes(self, dtype: str) -> int:
        """Bytes of K and V, each element once."""
        return 2 * self.batch * self.kv_heads * self.kv_len * self.head_dim * ITEMSIZE[dtype]

    def __str__(self) -> str:
        sizes = (self.batch, self.q_heads, self.kv_heads, self.q_len, self.kv_len, self.head_dim)
        return ",".join(map(str, sizes)) + (",causal" if self.causal else "")


@dataclass(frozen=True)
class Limits:
    """What this machine can do, measured in the same run: fp32 GEMM in flop/s, reading in byte/s."""

    gemm: float
    read: float

    def attention_s(self, shape: Shape, dtype: str) -> float:
        """The least time of a call: its products at the GEMM rate or its K and V at the read rate, whichever takes longer."""
        return max(shape.flops / self.gemm, shape.kv_bytes(dtype) / self.read)

    def product_flops(self, rows: int, features: int, width: int, dtype: str) -> float:
        """The highest rate of x [rows, width] @ weight [features, width].T, in flop/s: min(GEMM rate, read rate * intensity)."""
        return min(self.gemm, self.read * intensity(rows, features, width, dtype))


def visible_pairs(q_len: int, kv_len: int, causal: bool, window: int = -1) -> int:
    """Pairs (i, j) that a query may see: query i stands at key i + kv_len - q_len, sees none after it if causal, and `window` before."""
    total = 0
    for place in range(kv_len - q_len, kv_len):
        first = 0 if window < 0 else max(place - window, 0)
        last = min(place, kv_len - 1) if causal else kv_len - 1
        total += max(last - first + 1, 0)
    return total


def product_bytes(rows: int, features: int, width: int, dtype: str) -> int:
    """Bytes a product must read: the weight and the input, each once."""
    return (features * width + rows * width) * ITEMSIZE[dtype]


def intensity(rows: int, features: int, width: int, dtype: str) -> float:
    """Operations for each byte read, of x [rows, width] @ weight [features, width].T."""
    return 2 * rows * features * width / product_bytes(rows, features, width, dtype)


def geometric_mean(values) -> float:
    """exp(mean(log(values))); values positive and at least one."""
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def exponent(sizes, times) -> float:
    """The slope of log(time) over log(size), least squares: time grows as size ** exponent."""
    x, y = [math.log(size) for size in sizes], [math.log(seconds) for seconds in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


P1 = Shape(1, 32, 32, 512, 512, 128, causal=True)
P2 = Shape(1, 16, 16, 2048, 2048, 64, causal=True)
P3 = Shape(1, 32, 8, 1024, 1024, 128, causal=True)
D1 = Shape(1, 32, 8, 1, 4096, 128)
D2 = Shape(8, 32, 8, 1, 2048, 128)
D3 = Shape(1, 32, 32, 1, 8192, 128)
SHAPES = {"P1": P1, "P2": P2, "P3": P3, "D1": D1, "D2": D2, "D3": D3}

# Speed-up over torch SDPA on ZEN3: (the best peer's, the physical limit's), for fp32, fp16, bf16.
FIGURES = {
    "P1": ((1.5, 2.7), (3.2, 5.4), (1.0, 2.8)),
    "P2": ((1.0, 1.7), (1.8, 2.8), (1.0, 1.8)),
    "P3": ((1.2, 1.8), (1.9, 2.7), (1.0, 1.8)),
    "D1": ((2.1, 4.0), (20.0, 61.0), (12.0, 40.0)),
    "D2": ((1.8, 4.5), (19.5, 69.0), (10.8, 45.0)),
    "D3": ((1.8, 2.2), (10.6, 17.5), (4.9, 11.6)),
}

# The product of a large decoder layer, and the numbers of rows it is asked for.
FEATURES, WIDTH, ROWS = 8192, 4096, (1, 4, 32, 512)


def figure(name: str, dtype: str) -> tuple[float, float]:
    """(best peer's, limit's) speed-up over torch SDPA on ZEN3 of the shape `name`."""
    return FIGURES[name][DTYPES.index(dtype)]
