"""A call under a codec: what its values become on the wire, and how all ranks learn that one of them had to refuse.

A payload is the codec's bytes and one byte of status after them. NaN and Inf have no place on a grid of sixteen steps; the rank that
finds them sends zeros and a status that says so, the exchange runs to its end, and then every rank raises the same error. So nobody hangs,
and the communicator goes on working.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hetero_attn.collectives.codec.definition import GROUP, TorchKernels, features_size, groups_size
from hetero_attn.collectives.codec.features import FeatureTable
from hetero_attn.collectives.codec.traffic import Traffic
from hetero_attn.collectives.coding import PARTIAL, SUM, Coding

FINE, SUM_REFUSED, SOMEBODY_REFUSED = 0, 255, 254    # statuses; 1 + r is rank r's summand
Told = bool | int | torch.Tensor                     # what Backend.codec_kernels()' pack functions return; a tensor has one element


class NonFiniteError(ValueError):
    """A tensor with NaN or Inf was given to a codec. Every rank raises it; `.rank` had it (None: the sum has it), at `.site`."""

    def __init__(self, message: str, *, rank: int | None, site: str) -> None:
        super().__init__(message)
        self.rank, self.site = rank, site


class LossyCoding(Coding):
    """One call of a lossy codec. kernels: a backend's or TorchKernels. Subclasses say what lies before the status byte."""

    name = ""

    def __init__(self, site: str, rank: int, dtype: torch.dtype, kernels: TorchKernels, traffic: Traffic) -> None:
        self.site, self.rank, self.dtype, self._kernels, self.traffic = site, rank, dtype, kernels, traffic
        self._refusals: set[tuple[int, int]] = set()                # (status, sender of it); the least is told

    def body_size(self, first: int, count: int, stage: str) -> int:
        """Bytes of `count` > 0 values from `first` on, the status byte not counted; the same on every rank."""
        raise NotImplementedError(f"{type(self).__name__} must define body_size()")

    def pack(self, values: torch.Tensor, first: int, stage: str, body: torch.Tensor) -> Told:
        """values [count > 0] -> body; what the kernels told of them, for refused() and saturated() to read."""
        raise NotImplementedError(f"{type(self).__name__} must define pack()")

    def refused(self, told: Told) -> bool | torch.Tensor:
        """Whether a value was not finite."""
        raise NotImplementedError(f"{type(self).__name__} must define refused()")

    def saturated(self, told: Told) -> int | torch.Tensor:
        """How many values saturated, where none was refused."""
        return 0

    def unpack(self, body: torch.Tensor, sender: int, first: int, stage: str, out: torch.Tensor, accumulate: bool) -> None:
        """body -> out [count] fp32, written, or added to where `accumulate`; `sender` tells whose scales it was packed with."""
        raise NotImplementedError(f"{type(self).__name__} must define unpack()")

    # ---- Coding -----------------------------------------------------------------------------------------------------------

    def size(self, first: int, count: int, stage: str = PARTIAL) -> int:
        return self.body_size(first, count, stage) + 1

    def encode(self, values: torch.Tensor, first: int, stage: str = PARTIAL) -> torch.Tensor:
        count = values.numel()
        payload = torch.empty(self.size(first, count, stage), dtype=torch.uint8)
        return self.seal(payload, count, self.pack(values, first, stage, payload[:-1]), stage)

    def seal(self, payload: torch.Tensor, count: int, told: Told, stage: str) -> torch.Tensor:
        """A payload on the CPU, packed but for its last byte, with its status: fit to be sent. told: of its `count` values, by pack()."""
        refused = bool(self.refused(told))
        if refused:
            payload[:-1] = 0
            self.refuse(self.own_status(stage), self.rank)
        self.traffic.add(self.site, count, payload.numel(), 0 if refused else int(self.saturated(told)))
        payload[-1] = self.status
        return payload

    def own_status(self, stage: str) -> int:
        """What this rank says of values of its own that are not finite."""
        return SUM_REFUSED if stage == SUM else min(1 + self.rank, SOMEBODY_REFUSED)

    @property
    def status(self) -> int:
        """The worst that is known of the call so far."""
        return min(self._refusals)[0] if self._refusals else FINE

    def refuse(self, status: int, sender: int) -> None:
        """`sender` has said that a rank's values, or a sum, are not finite: finish() will raise it."""
        self._refusals.add((status, sender))

    def encode_pieces(
        self, values: torch.Tensor, counts: list[int], firsts: list[int], stage: str = PARTIAL
    ) -> Sequence[torch.Tensor | None]:
        return self.tell_all(super().encode_pieces(values, counts, firsts, stage))

    def tell_all(self, payloads: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        """Payloads on the CPU, each with the worst status: whichever piece it was in, its owner is not the only one who must know."""
        if self._refusals:
            for payload in payloads:
                if payload is not None:
                    payload[-1] = self.status
        return payloads

    def decode(self, payload: torch.Tensor, sender: int, first: int, count: int, stage: str = PARTIAL) -> torch.Tensor:
        out = torch.empty(count, dtype=torch.float32)
        self._read(payload, sender, first, stage, out, accumulate=False)
        return out

    def total(self, payloads: Sequence[torch.Tensor], first: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(count, dtype=torch.float32)
        for sender, payload in enumerate(payloads):
            self._read(payload, sender, first, PARTIAL, out, accumulate=sender > 0)
        return out.to(dtype)

    def finish(self) -> None:
        if not self._refusals:
            return
        status, sender = min(self._refusals)
        at = f"at {self.site}" if self.site else "of a call without a site"
        if status == SUM_REFUSED:
            whose, rank = f"the sum {at}, taken by rank {sender},", None
        elif status == SOMEBODY_REFUSED:
            whose, rank = f"a rank's values {at}", None
        else:
            whose, rank = f"rank {status - 1}'s values {at}", status - 1
        raise NonFiniteError(f"{whose} hold NaN or Inf, which codec {self.name} cannot carry; every rank refuses the call. Codec none lets "
                             "them through", rank=rank, site=self.site)

    # ---- pieces -----------------------------------------------------------------------------------------------------------

    def _read(self, payload: torch.Tensor, sender: int, first: int, stage: str, out: torch.Tensor, *, accumulate: bool) -> None:
        if self.heard(payload, sender):
            self.unpack(payload[:-1], sender, first, stage, out, accumulate)
        elif not accumulate:
            out.zero_()

    def heard(self, payload: torch.Tensor, sender: int) -> bool:
        """Whether a payload on the CPU holds values; what it says instead is kept."""
        status = int(payload[-1])
        if status != FINE:
            self.refuse(status, sender)
        return status == FINE


class GroupCoding(LossyCoding):
    """int8_group32 and int4_group32: scales are taken from the values, so it serves any site, and a sum like a summand."""

    def __init__(self, bits: int, *call) -> None:
        super().__init__(*call)
        self.bits, self.name, self.grain = bits, f"int{bits}_group32", GROUP

    def body_size(self, first: int, count: int, stage: str) -> int:
        return groups_size(count, self.bits)

    def pack(self, values: torch.Tensor, first: int, stage: str, body: torch.Tensor) -> Told:
        return self._kernels.pack_groups(values, self.bits, body)

    def refused(self, told: Told) -> bool | torch.Tensor:
        return told == 0                             # False, or a tensor that may be

    def unpack(self, body: torch.Tensor, sender: int, first: int, stage: str, out: torch.Tensor, accumulate: bool) -> None:
        self._kernels.unpack_groups(body, self.bits, out, accumulate)


class OutlierCoding(LossyCoding):
    """int4_outliers: static scales of this site, one table a sender and one for sums; all share the outliers."""

    name = "int4_outliers"

    def __init__(self, tables: Sequence[FeatureTable], sums: FeatureTable, *call) -> None:
        super().__init__(*call)
        self._tables, self._sums, self.grain = tables, sums, sums.features

    def _table(self, sender: int, stage: str) -> FeatureTable:
        return self._sums if stage == SUM else self._tables[sender]

    def body_size(self, first: int, count: int, stage: str) -> int:
        return features_size(first, count, self._sums)

    def pack(self, values: torch.Tensor, first: int, stage: str, body: torch.Tensor) -> Told:
        return self._kernels.pack_features(values, first, self._table(self.rank, stage), body)

    def refused(self, told: Told) -> bool | torch.Tensor:
        return told < 0

    def saturated(self, told: Told) -> int | torch.Tensor:
        return told

    def unpack(self, body: torch.Tensor, sender: int, first: int, stage: str, out: torch.Tensor, accumulate: bool) -> None:
        self._kernels.unpack_features(body, first, self._table(sender, stage), out, accumulate)
