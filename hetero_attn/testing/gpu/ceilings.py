"""What the device can do at most, measured in the same run: the rate of its 16-bit products and the bandwidth of a copy.

Shares are taken of these and not of a data sheet, because clocks, boards and neighbours differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hetero_attn.testing.gpu.clock import medians


@dataclass(frozen=True)
class Ceilings:
    """tflops: of a large product in narrow_dtype() (1e12 FLOP/s). gbps: bytes read plus bytes written by a copy (1e9 B/s)."""

    tflops: float
    gbps: float

    def of_rate(self, tflops: float) -> float:
        """Share of the matrix rate."""
        return tflops / self.tflops

    def of_bandwidth(self, gbps: float) -> float:
        """Share of the copy's bandwidth."""
        return gbps / self.gbps


def measured(device: torch.device, quick: bool = False) -> Ceilings:
    """Products of n x n in narrow_dtype(), and copies far larger than any cache. Raises RuntimeError where one does not run."""
    n, size = (8192, 1 << 30) if device.type == "cuda" else (512, 1 << 25)
    a, b = (torch.randn(n, n, dtype=narrow_dtype(device), device=device) for _ in range(2))
    out = torch.empty_like(a)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    found = medians({"product": lambda: torch.mm(a, b, out=out), "copy": lambda: target.copy_(source)}, device, 5 if quick else 20)
    for name, seconds in found.items():
        if isinstance(seconds, str):
            raise RuntimeError(f"the {name} that gives the ceiling does not run: {seconds}")
    return Ceilings(product_tflops(n, found["product"]), copy_gbps(size, found["copy"]))


def narrow_dtype(device: torch.device) -> torch.dtype:
    """What is measured in: bf16, or fp16 on CUDA devices before Ampere, whose tensor cores have no bf16."""
    old = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float16 if old else torch.bfloat16


def product_tflops(n: int, seconds: float) -> float:
    return 2 * n**3 / seconds / 1e12


def copy_gbps(size: int, seconds: float) -> float:
    """A copy of `size` bytes reads and writes each."""
    return 2 * size / seconds / 1e9


def attention_flop(batch: int, q_heads: int, q_len: int, kv_len: int, head_dim: int, is_causal: bool) -> float:
    """Two products of 2 FLOP a multiply-add; a causal call (bottom-right) only over the pairs that are seen."""
    pairs = q_len * kv_len
    if is_causal:
        pairs = sum(max(0, min(kv_len, i + kv_len - q_len + 1)) for i in range(q_len))
    return 4.0 * batch * q_heads * head_dim * pairs


def decode_bytes(batch: int, kv_heads: int, kv_len: int, head_dim: int, element: int) -> int:
    """Keys and values, each read once."""
    return 2 * batch * kv_heads * kv_len * head_dim * element


def norm_bytes(tokens: int, hidden: int, element: int) -> int:
    """Residual add and norm: x and the residual read, the residual and the norm written."""
    return 4 * tokens * hidden * element
