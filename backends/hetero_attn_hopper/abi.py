"""The Python twin of csrc/hopper/call.h: one call as bytes, which the kernels get by value, and the numbers that both sides know.

Every field is naturally aligned and there is no padding, so a '=' format describes the C layout exactly; tests/test_hopper_abi.py compares
fields, order and sizes with call.h.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

MAX_RANKS, MAX_CTAS, UNIT = 16, 32, 8
CHANNELS = 2 * MAX_CTAS
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}                    # numbers.cuh's Kind
LATE, OUT_OF_STEP = 1, 2                                                           # reasons in a status word (barrier.cuh)

# (name, C type, how many), in call.h's order. A pointer is an address, or 0 for null.
CALL = (
    ("buffer", "pointer", MAX_RANKS),
    *((name, "pointer", 1) for name in ("multicast", "status", "source", "out", "residual", "weight", "post_weight")),
    *((name, "int64", 1) for name in ("offset", "first", "count", "elements", "timeout_ns")),
    *((name, "int32", 1) for name in ("rank", "world", "hidden", "residual_kind", "weight_kind")),
    ("signature", "uint32", 1), ("number", "uint32", 1), ("eps", "float", 1), ("weight_offset", "float", 1),
    ("staging_units", "int32", 1), ("staging", "int64", 1),
)
_CODES = {"int32": "i", "uint32": "I", "int64": "q", "float": "f", "pointer": "Q"}
_call = struct.Struct("=" + "".join(f"{count}{_CODES[kind]}" for _, kind, count in CALL))
CALL_BYTES = _call.size
_NAMES = frozenset(name for name, _, _ in CALL)


def pack(values: Mapping[str, int | float | Sequence[int]]) -> bytes:
    """Field name -> value (a sequence for `buffer`, filled up with 0) as a Call; a field that is not named is 0."""
    if not _NAMES.issuperset(values):
        raise ValueError(f"call has fields {sorted(values.keys() - _NAMES)}, expected those of csrc/hopper/call.h")
    spread: list[int | float] = []
    for name, _, count in CALL:
        value = values.get(name, 0)
        if count == 1:
            spread.append(value)
        else:
            own = list(value or ())
            spread += own + [0] * (count - len(own))
    return _call.pack(*spread)


def signature(operation: str, *of: object) -> int:
    """16 bits of a call: ranks that make unlike calls at one meeting find out by them (all but one in 65536)."""
    return zlib.crc32(repr((operation, *of)).encode()) & 0xFFFF


class Status(NamedTuple):
    """A status word taken apart (barrier.cuh). reason: LATE or OUT_OF_STEP; other: the rank it is about; channel: which CTA's slots;
    meeting: of the call, 1 or 2; number: of the call."""

    reason: int
    other: int
    channel: int
    meeting: int
    number: int

    @classmethod
    def of(cls, word: int) -> Status:
        return cls(word >> 56 & 0xFF, word >> 48 & 0xFF, word >> 40 & 0xFF, word >> 32 & 0xFF, word & 0xFFFFFFFF)

    @property
    def slot(self) -> int:
        """The slot that stayed empty, among those of a phase."""
        return self.channel * MAX_RANKS + self.other

    @property
    def words(self) -> str:
        """What happened, for an error."""
        cta = f"CTA {self.channel % MAX_CTAS}, meeting {self.meeting} of the call, slot {self.slot}"
        if self.reason == OUT_OF_STEP:
            return f"rank {self.other} made another call: operation, dtype, sizes or CTAs differ ({cta})"
        return f"rank {self.other} did not come ({cta})"
