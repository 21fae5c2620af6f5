"""The collectives' cases as data: operation x dtype x shape x layout, and the inputs of every rank from a seed.

Every rank can make every other rank's inputs, so each computes the expected result alone, in fp64, without communicating.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import torch

FULL = os.environ.get("HETERO_ATTN_FULL") == "1"
WORLD_SIZES = (2, 3, 4) if FULL else (2, 3)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "transposed", "offset", "strided")
CHANNELS = 24


@dataclass(frozen=True)
class CollectiveCase:
    """One call. `shape` is every rank's x, unless the operation says otherwise (see `shape_of`). `variant` is the operation's own:
    all_gather: the axis, with '+' when ranks' extents differ; broadcast: the source, counted modulo the world;
    linear_all_reduce: who passes a bias; all_reduce_rms_norm: whose norm."""

    operation: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: str = "contiguous"
    variant: str = ""

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        return "-".join(filter(None, [self.operation, self.variant, str(self.dtype).removeprefix("torch."), shape, self.layout]))

    def shape_of(self, rank: int) -> tuple[int, ...]:
        """Rank's x. all_gather's '+': rank r has r more along the axis (rank 0 of extent 0 has none at all)."""
        if self.operation == "all_gather" and self.variant.endswith("+"):
            axis = int(self.variant[:-1]) % len(self.shape)
            return tuple(size + rank if i == axis else size for i, size in enumerate(self.shape))
        if self.operation == "linear_all_reduce":    # K_local differs too, and rank 0 has none when it starts from 0
            return (*self.shape[:-1], self.shape[-1] + 3 * rank)
        return self.shape

    def values(self, what: str, rank: int, shape: tuple[int, ...]) -> torch.Tensor:
        """The numbers of one input of one rank, contiguous, in the case's dtype; the same wherever they are asked for."""
        seed = int.from_bytes(hashlib.sha256(f"{self.name}/{what}/{rank}".encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(seed)
        if not self.dtype.is_floating_point:
            high = 2 if self.dtype == torch.bool else 100
            return torch.randint(0, high, shape, generator=generator).to(self.dtype)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

    def x(self, rank: int) -> torch.Tensor:
        return self.values("x", rank, self.shape_of(rank))


def laid_out(values: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, memory): x holds `values` with the strides the layout asks for, memory is all that x is a view of."""
    if layout == "transposed" and values.dim() >= 2:
        memory = values.transpose(0, -1).contiguous()
        return memory.transpose(0, -1), memory
    if layout == "offset":
        memory = torch.zeros(values.numel() + 5, dtype=values.dtype, device=values.device)
        x = memory[3 : 3 + values.numel()].view(values.shape)
        return x.copy_(values), memory
    if layout == "strided" and values.dim() >= 1:
        memory = torch.zeros(*values.shape[:-1], 2 * values.shape[-1] + 1, dtype=values.dtype, device=values.device)
        x = memory[..., 1::2]
        return x.copy_(values), memory
    memory = values.clone()
    return memory, memory


def _cases() -> list[CollectiveCase]:
    cases = []
    sizes = [(0,), (1,), (7, 5), (2, 3), (5, 0), (4, 3, 2)]
    for dtype in (*FLOATS, torch.int64):
        for operation in ("all_reduce", "reduce_scatter"):
            cases += [CollectiveCase(operation, dtype, shape) for shape in sizes]
            cases += [CollectiveCase(operation, dtype, (7, 5), layout) for layout in LAYOUTS[1:]]
        cases += [CollectiveCase("all_gather", dtype, (3, 4), layout, "0") for layout in LAYOUTS]
        cases += [CollectiveCase("broadcast", dtype, (3, 4), layout, "1") for layout in LAYOUTS]
    for shape in ((), (1 << 18,) if not FULL else (1 << 22,)):                    # 1 MiB of fp32; reduced in pieces by most algorithms
        cases += [CollectiveCase("all_reduce", dtype, shape) for dtype in (*FLOATS, torch.int64)]
    cases += [CollectiveCase("reduce_scatter", dtype, (257, 1024)) for dtype in FLOATS]
    cases += [CollectiveCase("all_reduce", dtype, (9,)) for dtype in (torch.int32, torch.int16, torch.uint8, torch.int8)]
    for variant in ("0", "0+", "1", "-1+"):
        for shape in ((3, 4), (0, 4), (2, 3, 5), (0, 0)):
            cases += [CollectiveCase("all_gather", dtype, shape, "contiguous", variant) for dtype in (torch.float32, torch.bfloat16)]
    cases += [CollectiveCase("all_gather", dtype, (5,), "contiguous", "0+") for dtype in (torch.bool, torch.uint8, torch.int16)]
    for dtype in (torch.float32, torch.int64, torch.bool, torch.bfloat16):
        cases += [CollectiveCase("broadcast", dtype, shape, "contiguous", "0") for shape in ((), (0, 3), (6,), (300, 300))]
    for dtype in FLOATS:
        for variant in ("no bias", "bias on rank 0", "bias everywhere"):
            for shape in ((5, 8), (1, 0), (0, 4), (2, 3, 4), (24, 8)):          # the last: rows enough for a fused operator
                cases.append(CollectiveCase("linear_all_reduce", dtype, shape, "contiguous", variant))
        for variant in ("llama", "gemma", "gemma with post norm", "llama with post norm"):
            for rows in (1, 2, 7, 64):
                cases.append(CollectiveCase("all_reduce_rms_norm", dtype, (rows, CHANNELS), "contiguous", variant))
        cases.append(CollectiveCase("all_reduce_rms_norm", dtype, (0, CHANNELS), "contiguous", "llama"))
        cases.append(CollectiveCase("all_reduce_rms_norm", dtype, (7, CHANNELS), "strided", "llama"))
    return cases


CASES: list[CollectiveCase] = _cases()
