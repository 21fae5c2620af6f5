"""Backend.linear on the product of a large decoder layer, beside torch's and beside what the machine allows at that intensity.

One row reads the weight once and computes little; 512 rows are bound by the GEMM rate. The requirement is a share of whichever bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cpu import verdicts
from cpu.limits import GemmProbe, ReadProbe
from cpu.shapes import DTYPES, FEATURES, ROWS, WIDTH, Limits, product_bytes
from cpu.timing import round_robin
from cpu.verdicts import Verdict
from hetero_attn import registry

FEATURES_CHECKED = 128


@dataclass
class Product:
    """x [rows, WIDTH] @ weight [FEATURES, WIDTH].T in one dtype: median seconds of ours and torch's; `fault` if ours is wrong."""

    rows: int
    dtype: str
    ours_s: float
    torch_s: float
    limits: Limits
    fault: str | None = None

    def flops(self, seconds: float) -> float:
        return 2 * self.rows * FEATURES * WIDTH / seconds

    def read_rate(self, seconds: float) -> float:
        """Bytes of weight and input a second."""
        return product_bytes(self.rows, FEATURES, WIDTH, self.dtype) / seconds

    @property
    def limit(self) -> float:
        return self.limits.product_flops(self.rows, FEATURES, WIDTH, self.dtype)

    def verdict(self) -> Verdict:
        if self.fault:
            return Verdict(f"linear M={self.rows} {self.dtype}", False, self.fault)
        return verdicts.product(self.rows, self.dtype, self.flops(self.ours_s), self.limit)


def measure(backend: str, rounds: int, progress: Callable[[str], None]) -> list[Product]:
    """Every number of rows in every dtype."""
    linear, products = registry.get(backend).linear, []
    gemm = GemmProbe()
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        kind = getattr(torch, dtype)
        weight = torch.randn(FEATURES, WIDTH, generator=generator).to(kind)
        read = ReadProbe(weight.nbytes)
        for rows in ROWS:
            progress(f"linear {FEATURES}x{WIDTH}, M={rows}, {dtype}")
            x = torch.randn(rows, WIDTH, generator=generator).to(kind)
            out = torch.empty(rows, FEATURES, dtype=kind)
            with torch.inference_mode():
                linear(x, weight, None, out)
                fault = wrong(out, x, weight)
                timed = {"ours": lambda x=x, w=weight, o=out: linear(x, w, None, o), "torch": lambda x=x, w=weight: F.linear(x, w)}
                seconds, readings = round_robin(timed, {"gemm": gemm, "read": read}, rounds)
            products.append(Product(rows, dtype, seconds["ours"], seconds["torch"], Limits(readings["gemm"], readings["read"]), fault))
    return products


def wrong(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why out [M, N] is not x [M, K] @ weight [N, K].T with fp32 accumulation, rounded once; None if it is (some columns are looked at)."""
    columns = torch.linspace(0, weight.shape[0] - 1, FEATURES_CHECKED).round().long()
    expected = x.double() @ weight[columns].double().T
    size = x.shape[1] ** 0.5                                # what K products of normal numbers add up to
    allowed = torch.finfo(out.dtype).eps * expected.abs() + 4e-6 * size
    excess = ((out[:, columns].double() - expected).abs() - allowed).max().item()
    return None if excess <= 0 else f"wrong: {excess:.3g} beyond one rounding of an fp32 sum"
