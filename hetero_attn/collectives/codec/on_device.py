"""Packing where the values are: of a device's tensor only the packed bytes cross to the host, and those of the other ranks come back.

A payload is packed behind what the calling stream holds and lands in pinned memory by a lane of its own; the host waits for the lane's mark
before it sends a byte of it. What the others sent goes up in one copy a sum, by another lane, and the calling stream waits for that mark
before it unpacks and adds, in rank order as on the host. The bytes and the fp32 sums are the definition's, so ranks that pack on the device
and ranks that pack on the host make one group, and a device whose kernels fail their proof goes through the host like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hetero_attn.collectives.codec.lossy import LossyCoding, Told
from hetero_attn.collectives.codec.proof import disagreement
from hetero_attn.collectives.codec.traffic import Traffic
from hetero_attn.collectives.coding import PARTIAL, Coding
from hetero_attn.collectives.lane import Lane, lanes

HEADER = 8                                           # bytes before a payload that has landed: what its kernel told, int64
ALIGN = 16                                           # of payloads side by side on the device


class Landing:
    """A payload on its way to the host. `started`: the mark of its copies into `memory` uint8 [HEADER + n + 1]."""

    def __init__(self, memory: torch.Tensor, started: Any) -> None:
        self._memory, self._started = memory, started

    def wait(self) -> tuple[int, torch.Tensor]:
        """(what the kernel told, the payload uint8 [n + 1] on the CPU but for its status), when both are there."""
        self._started.synchronize()
        return int(self._memory[:HEADER].view(torch.int64)), self._memory[HEADER:]


class DevicePath:
    """The way between a device and the wire. kernels: of backend `name`, as Backend.codec_kernels() describes them; down, up: lanes for
    copies from and to the device (None: streams of its own); traffic: counts the bytes that cross."""

    def __init__(
        self, kernels: Any, name: str, device: torch.device, traffic: Traffic, *, down: Lane | None = None, up: Lane | None = None,
    ) -> None:
        self.kernels, self.name, self.device, self._traffic = kernels, name, device, traffic
        self._down, self._up = (down, up) if down and up else lanes(device, 2)
        self._proved: dict[tuple[str, torch.dtype], str | None] = {}

    def objection(self, codec: str, dtype: torch.dtype) -> str | None:
        """Why values of this dtype are not packed here: the kernels were tried on a few, once, and gave other bytes or an error."""
        key = codec, dtype
        if key not in self._proved:
            self._proved[key] = disagreement(self.kernels, codec, dtype, self.device)
        return self._proved[key]

    def land(self, body: torch.Tensor, told: Told) -> Landing:
        """Begin to bring body uint8 [n] and what its kernel told to the host."""
        memory = self.host_memory(HEADER + body.numel() + 1)
        header, payload = memory[:HEADER].view(torch.int64), memory[HEADER:-1]
        for tensor in (body, told):
            if isinstance(tensor, torch.Tensor):
                self._down.keep(tensor)

        def copy() -> None:
            if isinstance(told, torch.Tensor):
                header.copy_(told.reshape(1), non_blocking=True)
            else:
                header.fill_(int(told))
            payload.copy_(body, non_blocking=True)

        self._traffic.bytes_down += memory.numel()
        return Landing(memory, self._down.start(copy))

    def lift(self, bodies: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Bytes on the CPU, which may change at once, on the device: the calling stream's to read."""
        places = [-(-body.numel() // ALIGN) * ALIGN for body in bodies]
        memory = self.host_memory(sum(places))
        for place, body in zip(memory.split(places), bodies):
            place[: body.numel()] = body
        target = self._up.keep(self.device_memory(memory.numel()))
        self._up.start(lambda: target.copy_(memory, non_blocking=True)).wait()
        self._traffic.bytes_up += memory.numel()
        return [place[: body.numel()] for place, body in zip(target.split(places), bodies)]

    def host_memory(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] that no copy still uses: torch gives pinned memory out again when the streams are done with it."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.device.type != "cpu")

    def device_memory(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] for the calling stream."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    @contextmanager
    def named(self, doing: str, site: str) -> Iterator[None]:
        """What fails inside becomes a RuntimeError that says what was being done where: this rank's failure, not one of the arguments."""
        try:
            yield
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0]
            raise RuntimeError(f"{doing} the sum{f' at {site}' if site else ''} on {self.device} by backend {self.name} failed "
                               f"({type(error).__name__}: {text}); without {self.name} in the profile's backends the host packs") from error


class StagedCoding(Coding):
    """A lossy coding whose values are on a device and whose payloads travel through host memory. lossy: made with the path's kernels."""

    on_device = True

    def __init__(self, lossy: LossyCoding, path: DevicePath) -> None:
        self._lossy, self._path, self.grain = lossy, path, lossy.grain
        self._own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}            # address of a payload -> it, and its body on the device

    def size(self, first: int, count: int, stage: str = PARTIAL) -> int:
        return self._lossy.size(first, count, stage)

    def encode(self, values: torch.Tensor, first: int, stage: str = PARTIAL) -> torch.Tensor:
        return self._landed(self._begin(values, first, stage), values.numel(), stage)

    def encode_runs(self, values: torch.Tensor, counts: list[int], firsts: list[int]) -> Iterator[torch.Tensor]:
        begun = [self._begin(run, first, PARTIAL) for run, first in zip(values.split(counts), firsts)]
        for each, count in zip(begun, counts):       # the device packs on while the first ones are sent
            yield self._landed(each, count, PARTIAL)

    def encode_pieces(
        self, values: torch.Tensor, counts: list[int], firsts: list[int], stage: str = PARTIAL
    ) -> Sequence[torch.Tensor | None]:
        pieces = zip(values.split(counts), firsts)
        begun = [self._begin(piece, first, stage) if piece.numel() else None for piece, first in pieces]
        return self._lossy.tell_all([each and self._landed(each, count, stage) for each, count in zip(begun, counts)])

    def decode(self, payload: torch.Tensor, sender: int, first: int, count: int, stage: str = PARTIAL) -> torch.Tensor:
        return self._sum({sender: payload}, first, count, stage)

    def total(self, payloads: Sequence[torch.Tensor], first: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        return self._sum(dict(enumerate(payloads)), first, count, PARTIAL).to(dtype)

    def finish(self) -> None:
        self._lossy.finish()

    # ---- pieces -----------------------------------------------------------------------------------------------------------

    def _begin(self, values: torch.Tensor, first: int, stage: str) -> tuple[torch.Tensor, Landing]:
        """Values on the device -> their bytes there, and on their way to the host."""
        with self._path.named("packing", self._lossy.site):
            body = self._path.device_memory(self.size(first, values.numel(), stage) - 1)
            return body, self._path.land(body, self._lossy.pack(values, first, stage, body))

    def _landed(self, begun: tuple[torch.Tensor, Landing], count: int, stage: str) -> torch.Tensor:
        body, landing = begun
        with self._path.named("packing", self._lossy.site):
            told, payload = landing.wait()
        self._own[payload.data_ptr()] = payload, body                          # what we sum ourselves need not come back
        return self._lossy.seal(payload, count, told, stage)

    def _sum(self, payloads: dict[int, torch.Tensor], first: int, count: int, stage: str) -> torch.Tensor:
        """What the senders' payloads hold, added in their order: fp32 [count] on the device; zeros for a sender that refused."""
        heard = {sender: payload for sender, payload in payloads.items() if self._lossy.heard(payload, sender)}
        with self._path.named("unpacking", self._lossy.site):
            bodies = {sender: self._own[payload.data_ptr()][1] for sender, payload in heard.items() if payload.data_ptr() in self._own}
            coming = [sender for sender in heard if sender not in bodies]
            if coming:
                bodies |= zip(coming, self._path.lift([heard[sender][:-1] for sender in coming]))
            out = torch.empty(count, dtype=torch.float32, device=self._path.device)
            if not heard:
                out.zero_()
            for place, sender in enumerate(heard):
                self._lossy.unpack(bodies[sender], sender, first, stage, out, place > 0)
            return out
