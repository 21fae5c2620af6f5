"""How values become the bytes of a message and values again: the seam between an algorithm, which moves bytes, and a codec.

An algorithm never looks into a payload. It asks a Coding, made for one call, to encode a run of values that starts at `first` of the
flattened tensor (so that a codec finds the features that the values belong to), and to decode what a sender encoded. Plain is the coding
that changes nothing; lossy ones come from codecs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
PARTIAL, SUM = "partial", "sum"                      # what a payload holds: one rank's summand, or what has been summed up already


class Coding:
    """Values of one call to bytes and back. `lossless`: decode gives back what was encoded, so a rank need not read its own payload.
    grain: runs that begin at multiples of so many values take no more bytes, and become the same values, as one long run. on_device: values
    are taken, and given back, on the device that they are on, whatever that is; else on the CPU. Payloads are for the wire: on the CPU."""

    lossless = False
    on_device = False
    grain = 1

    def size(self, first: int, count: int, stage: str = PARTIAL) -> int:
        """How many bytes `count` > 0 values from `first` on take; every rank must find the same."""
        raise NotImplementedError(f"{type(self).__name__} must define size()")

    def encode(self, values: torch.Tensor, first: int, stage: str = PARTIAL) -> torch.Tensor:
        """Contiguous values [count] as uint8 [size]; may share memory with them."""
        raise NotImplementedError(f"{type(self).__name__} must define encode()")

    def encode_pieces(
        self, values: torch.Tensor, counts: list[int], firsts: list[int], stage: str = PARTIAL
    ) -> Sequence[torch.Tensor | None]:
        """Each run of counts[i] of contiguous values [sum of counts], encoded by itself as from firsts[i] on; None for an empty run."""
        pieces = zip(values.split(counts), firsts)
        return [self.encode(piece, first, stage) if piece.numel() else None for piece, first in pieces]

    def encode_runs(self, values: torch.Tensor, counts: list[int], firsts: list[int]) -> Iterator[torch.Tensor]:
        """encode() of one run after the other, each when it is asked for, so that it can be sent before the next one is ready."""
        for run, first in zip(values.split(counts), firsts):
            yield self.encode(run, first)

    def decode(self, payload: torch.Tensor, sender: int, first: int, count: int, stage: str = PARTIAL) -> torch.Tensor:
        """What `sender` encoded, as a tensor [count] of the call's dtype, or fp32 where that is 16 bits wide; may share memory."""
        raise NotImplementedError(f"{type(self).__name__} must define decode()")

    def total(self, payloads: Sequence[torch.Tensor], first: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """The sum of what all ranks encoded, payloads in rank order, as sum_in_rank_order() takes it: [count] of `dtype`."""
        return sum_in_rank_order([self.decode(payload, sender, first, count) for sender, payload in enumerate(payloads)], dtype)

    def finish(self) -> None:
        """The call's messages are all through, on every rank: the time to raise what a payload could only say. Default: nothing."""


class Plain(Coding):
    """The values' own bytes."""

    lossless = True

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def size(self, first: int, count: int, stage: str = PARTIAL) -> int:
        return count * self.dtype.itemsize

    def encode(self, values: torch.Tensor, first: int, stage: str = PARTIAL) -> torch.Tensor:
        return values.view(torch.uint8)

    def encode_pieces(
        self, values: torch.Tensor, counts: list[int], firsts: list[int], stage: str = PARTIAL
    ) -> Sequence[torch.Tensor | None]:
        item = self.dtype.itemsize
        return values.view(torch.uint8).split([count * item for count in counts])

    def decode(self, payload: torch.Tensor, sender: int, first: int, count: int, stage: str = PARTIAL) -> torch.Tensor:
        return payload.view(self.dtype)


def sum_in_rank_order(parts: torch.Tensor | Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """parts, N tensors [n], added one by one in the order given, 16-bit floats in fp32, rounded once: [n] of `dtype`."""
    total = parts[0].to(WIDER.get(dtype, dtype), copy=True)
    for part in parts[1:]:
        total += part
    return total.to(dtype)
