"""Whether a backend's codec kernels write the definition's bytes on a device, tried on a few values before they serve.

All ranks must come to the same bits, whoever packs: a compiler that fuses a multiply-add, or a device that flushes small numbers, would
part them without an error. The values hold what tells such kernels apart: a last group that is not whole, zeros, ties, tiny and large ones.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from hetero_attn.collectives.codec.definition import TorchKernels, features_size, groups_size
from hetero_attn.collectives.codec.features import FeatureTable

COUNT, FEATURES, FIRST = 171, 37, 5                  # five whole groups and a piece; a call that begins within a row


def disagreement(kernels: Any, codec: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """What the kernels do otherwise than the definition, in words; None = nothing. codec: one of codec.NAMES."""
    try:
        return _disagreement(kernels, codec, dtype, device)
    except Exception as error:                       # whatever it is, it is a reason to pack elsewhere
        return f"its codec kernels fail ({type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]})"


def _disagreement(kernels: Any, codec: str, dtype: torch.dtype, device: torch.device) -> str | None:
    values, here = _values(dtype), _values(dtype).to(device)
    if codec == "int4_outliers":
        table = _table()
        size = features_size(FIRST, COUNT, table)
        pack = lambda of, x, body: of.pack_features(x, FIRST, table, body)
        unpack = lambda of, body, out, add: of.unpack_features(body, FIRST, table, out, add)
    else:
        bits = 8 if codec.startswith("int8") else 4
        size = groups_size(COUNT, bits)
        pack = lambda of, x, body: of.pack_groups(x, bits, body)
        unpack = lambda of, body, out, add: of.unpack_groups(body, bits, out, add)
    expected, found = torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8, device=device)
    told, want = pack(kernels, here, found), pack(TorchKernels(), values, expected)
    if int(told) != int(want):
        return f"its kernel for {codec} tells {int(told)} of values of which the definition tells {int(want)}"
    wrong = (found.cpu() != expected).nonzero().flatten().tolist()
    if wrong:
        return f"its kernel for {codec} writes other bytes than the definition ({len(wrong)} of {size}, the first at {wrong[0]})"
    sums = []
    for of, body in ((TorchKernels(), expected), (kernels, found)):
        out = torch.empty(COUNT, dtype=torch.float32, device=body.device)
        for add in (False, True):
            unpack(of, body, out, add)
        sums.append(out.cpu().view(torch.int32))
    wrong = (sums[0] != sums[1]).nonzero().flatten().tolist()
    return f"its kernel for {codec} reads other values than the definition ({len(wrong)} of {COUNT})" if wrong else None


@cache
def _values(dtype: torch.dtype) -> torch.Tensor:
    """[COUNT] of every size that the dtype holds, on the CPU."""
    generator = torch.Generator().manual_seed(29)
    values = torch.randn(COUNT, generator=generator, dtype=torch.float64)
    values[32:64] *= 1e-41 if dtype != torch.float16 else 1e-7         # a group below the smallest scale
    values[64:96] *= 3e37 if dtype != torch.float16 else 1e4
    values[100:104] = torch.tensor([0.0, 7.0, 3.5, 2.5])
    return values.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)


@cache
def _table() -> FeatureTable:
    generator = torch.Generator().manual_seed(31)
    scale, mean = torch.rand(FEATURES, generator=generator) / 7, torch.randn(FEATURES, generator=generator) / 9
    return FeatureTable(scale, mean, torch.tensor([3, 17, 36], dtype=torch.int32))
