"""Coded sums over a device library (NCCL, HCCL): payloads are the device's tensors of bytes, and nothing but statuses reaches the host.

Such a library sums on its own way, in values; a codec's payloads are summed by whoever unpacks them. So its collectives move bytes only: an
all-gather where everybody gets everything (one_shot), an exchange of pieces and an all-gather of their sums (two_shot). What a kernel tells
of refused values becomes the payload's last byte on the device, and the host looks at all of them once, at the end of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hetero_attn.collectives.codec.lossy import LossyCoding
from hetero_attn.collectives.coding import PARTIAL, SUM, Coding
from hetero_attn.collectives.direct import Steps, starts
from hetero_attn.communicator import shard_counts

NOBODY = 1 << 10                                     # above every status

# flat uint8 [sizes[rank]] of each rank -> uint8 [N, longest], every rank's; what lies behind a shorter one is anything.
Gather = Callable[[torch.Tensor, list[int]], Steps]
# uint8 [sum of sizes], sizes[r] bytes for rank r -> uint8 [N, own], from each rank what it had for this one.
Swap = Callable[[torch.Tensor, list[int], int], Steps]


class ResidentCoding(Coding):
    """A lossy coding whose payloads stay on the values' device. lossy: made with kernels that take such tensors."""

    on_device = True

    def __init__(self, lossy: LossyCoding) -> None:
        self._lossy, self.grain = lossy, lossy.grain
        self._saturated: list[tuple[int, int, Any]] = []                        # values, bytes, how many saturated
        self._heard: list[tuple[torch.Tensor, int]] = []                        # status [1], sender

    def size(self, first: int, count: int, stage: str = PARTIAL) -> int:
        return self._lossy.size(first, count, stage)

    def encode(self, values: torch.Tensor, first: int, stage: str = PARTIAL) -> torch.Tensor:
        count = values.numel()
        payload = torch.empty(self.size(first, count, stage), dtype=torch.uint8, device=values.device)
        told = torch.as_tensor(self._lossy.pack(values, first, stage, payload[:-1]), device=values.device)
        refused = torch.as_tensor(self._lossy.refused(told))
        payload[:-1].masked_fill_(refused, 0)
        known = [torch.where(refused, self._lossy.own_status(stage), NOBODY).reshape(1)]
        known += [torch.where(status == 0, NOBODY, status.to(torch.int64)) for status, _ in self._heard]
        worst = torch.cat(known).min()
        payload[-1:] = torch.where(worst == NOBODY, 0, worst)
        saturated = torch.as_tensor(self._lossy.saturated(told), device=values.device)
        self._saturated.append((count, payload.numel(), torch.where(refused, 0, saturated)))
        self._heard.append((payload[-1:], self._lossy.rank))
        return payload

    def encode_pieces(
        self, values: torch.Tensor, counts: list[int], firsts: list[int], stage: str = PARTIAL
    ) -> Sequence[torch.Tensor | None]:
        payloads = super().encode_pieces(values, counts, firsts, stage)         # each has the worst of those before it: the last has all
        made = [payload for payload in payloads if payload is not None]
        for payload in made[:-1]:
            payload[-1:] = made[-1][-1:]
        return payloads

    def decode(self, payload: torch.Tensor, sender: int, first: int, count: int, stage: str = PARTIAL) -> torch.Tensor:
        out = torch.empty(count, dtype=torch.float32, device=payload.device)
        self._read(payload, sender, first, stage, out, False)
        return out

    def total(self, payloads: Sequence[torch.Tensor], first: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(count, dtype=torch.float32, device=payloads[0].device)
        for sender, payload in enumerate(payloads):
            self._read(payload, sender, first, PARTIAL, out, sender > 0)
        return out.to(dtype)

    def finish(self) -> None:
        """Waits for the device, once."""
        answers = [status for status, _ in self._heard] + [saturated.reshape(1) for *_, saturated in self._saturated]
        told = torch.cat([each.to(torch.int64) for each in answers]).tolist()
        for (count, nbytes, _), saturated in zip(self._saturated, told[len(self._heard) :]):
            self._lossy.traffic.add(self._lossy.site, count, nbytes, saturated)
        for status, (_, sender) in zip(told, self._heard):
            if status:
                self._lossy.refuse(status, sender)
        self._lossy.finish()

    def _read(self, payload: torch.Tensor, sender: int, first: int, stage: str, out: torch.Tensor, accumulate: bool) -> None:
        """Where the sender refused the numbers mean nothing; finish() will say so."""
        self._heard.append((payload[-1:], sender))
        self._lossy.unpack(payload[:-1], sender, first, stage, out, accumulate)


class ThroughHost:
    """Codec kernels for a device that has none: each call takes its tensors to the host and its result back. kernels: the host's."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels

    def pack_groups(self, values: torch.Tensor, bits: int, body: torch.Tensor) -> bool:
        host = torch.empty(body.numel(), dtype=torch.uint8)
        fine = self._kernels.pack_groups(values.cpu(), bits, host)
        body.copy_(host)
        return fine

    def unpack_groups(self, body: torch.Tensor, bits: int, out: torch.Tensor, accumulate: bool) -> None:
        host = out.cpu()
        self._kernels.unpack_groups(body.cpu(), bits, host, accumulate)
        out.copy_(host)

    def pack_features(self, values: torch.Tensor, first: int, table: Any, body: torch.Tensor) -> int:
        host = torch.empty(body.numel(), dtype=torch.uint8)
        told = self._kernels.pack_features(values.cpu(), first, table, host)
        body.copy_(host)
        return told

    def unpack_features(self, body: torch.Tensor, first: int, table: Any, out: torch.Tensor, accumulate: bool) -> None:
        host = out.cpu()
        self._kernels.unpack_features(body.cpu(), first, table, host, accumulate)
        out.copy_(host)


def all_reduce(algorithm: str, gather: Gather, swap: Swap, rank: int, world_size: int, coding: Coding, flat: torch.Tensor) -> Steps:
    """Sum flat [n > 0] over the ranks into flat. algorithm: one_shot as direct.py has it, any other as two_shot."""
    count = flat.numel()
    if algorithm == "one_shot":
        payload = coding.encode(flat, 0)
        parts = yield from gather(payload, [payload.numel()] * world_size)                     # [N, bytes]
        flat.copy_(coding.total(list(parts), 0, count, flat.dtype))
        return
    counts = shard_counts(world_size, count)
    first = starts(counts)
    own = yield from reduce_scatter(swap, rank, coding, flat, counts)
    payload = coding.encode(own, first[rank], SUM) if own.numel() else flat.new_empty(0, dtype=torch.uint8)
    sizes = [coding.size(at, each, SUM) if each else 0 for at, each in zip(first, counts)]
    parts = yield from gather(payload, sizes)                                                  # [N, longest]
    sums = [coding.decode(parts[sender][: sizes[sender]], sender, first[sender], counts[sender], SUM)
            for sender in range(world_size) if counts[sender]]
    flat.copy_(torch.cat(sums))


def reduce_scatter(swap: Swap, rank: int, coding: Coding, flat: torch.Tensor, counts: list[int]) -> Steps:
    """flat [sum of counts] of each rank -> the sum of this rank's piece [counts[rank]], in flat's dtype."""
    first = starts(counts)
    payloads = coding.encode_pieces(flat, counts, first)
    sizes = [0 if payload is None else payload.numel() for payload in payloads]
    parts = yield from swap(torch.cat([payload for payload in payloads if payload is not None]), sizes, sizes[rank])
    return coding.total(list(parts), first[rank], counts[rank], flat.dtype) if counts[rank] else flat[:0].clone()
