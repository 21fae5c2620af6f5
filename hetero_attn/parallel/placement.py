"""Where each layer's KV lives when the device cannot hold it all: FastAttention's L_GPU and L_CPU, in pure Python.

With b bytes of K and V a layer, of this rank's heads (2 · tokens · Hkv · D · itemsize), and n layers whose KV lies in host memory,

    (L − n) · b  +  min(n, BUFFERS) · b  +  c · b  <=  room = memory − weights − activations − reserve

where c is how often the device's attention gathers a layer's pages (models/gathering.py): 0 for kernels that read them where they lie.
The paper's formula has neither c nor buffers. A prompt longer than one chunk needs the buffers: the device attends over what earlier chunks
left on the host, one layer at a time, while the next layer's is on its way. Host layers are spread over the pass, so that a copy has the
products of the layers between two of them to hide behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from hetero_attn.profile import PLACEMENT_FORM
from hetero_attn.quantity import shown_bytes

BUFFERS = 2                                          # one is read while the next is filled
AUTO, ALL_DEVICE = "auto", "all-device"
HOST_SHARE = 0.9                                     # of a host's memory that KV may take; the rest is the processes' own, and margin
HOST_ROWS = 16                                       # see attends_on_host


class DeviceMemoryError(MemoryError):
    """What was asked for does not fit the device's memory. One line: what is needed, what there is, what to do."""


@dataclass(frozen=True)
class Figures:
    """One rank's device in bytes: what it may use, and what is taken before any KV. total None: nobody said, and nobody can be asked."""

    total: int | None
    weights: int = 0
    activations: int = 0
    reserve: int = 0

    @property
    def room(self) -> int | None:
        """What is left for KV and buffers; below 0 where not even the rest fits."""
        return None if self.total is None else self.total - self.weights - self.activations - self.reserve

    def __str__(self) -> str:
        parts = ", ".join(f"{shown_bytes(size)} {name}" for name, size in
                          (("weights", self.weights), ("activations", self.activations), ("reserve", self.reserve)) if size)
        return f"{shown_bytes(self.total or 0)} less {parts or 'nothing'}"


@dataclass(frozen=True)
class Placement:
    """The layers of one rank whose KV lies in host memory, in order; all others' lies on the device. layer_bytes: b of the whole cache;
    copies: of one layer's KV that attention gathers on the device, c."""

    layers: int
    host: tuple[int, ...] = ()
    layer_bytes: int = 0
    copies: int = 0

    @property
    def device(self) -> tuple[int, ...]:
        """The layers whose KV lies on the device."""
        return tuple(layer for layer in range(self.layers) if layer not in self.host)

    @property
    def buffers(self) -> int:
        """Layers' KV that the device holds beside its own, while a prompt runs."""
        return min(len(self.host), BUFFERS)

    @property
    def device_bytes(self) -> int:
        """KV, buffers, and what attention gathers."""
        return (self.layers - len(self.host) + self.buffers + self.copies) * self.layer_bytes

    @property
    def host_bytes(self) -> int:
        return len(self.host) * self.layer_bytes

    def __str__(self) -> str:
        if not self.host:
            return f"layers {ranges(range(self.layers))} on device"
        on_device = f"layers {ranges(self.device)} on device, " if self.device else "no layer on device, "
        return f"{on_device}{ranges(self.host)} on host"


def parse(text: str) -> str | int:
    """'auto', 'all-device', or the number of layers of 'N-host-layers' or plain 'N'. Raises ValueError."""
    text = text.strip()
    if text in (AUTO, ALL_DEVICE):
        return text
    found = re.fullmatch(r"([0-9]+)(-host-layers)?", text)
    if not found:
        raise ValueError(f"{text!r} is no placement, expected {PLACEMENT_FORM}")
    return int(found[1])


def place(
    layers: int, layer_bytes: int, room: int | None, asked: str | int = AUTO, host_room: int | None = None,
    host_layer_bytes: int | None = None, copies: int = 0,
) -> Placement:
    """The placement of a cache whose K and V take layer_bytes a layer, and host_layer_bytes in host memory (None: as much).

    copies: of a layer's KV that attention gathers. room: bytes of the device for KV (None: no limit is known, and auto keeps all on the
    device); host_room: bytes of host memory (None: no limit). Raises DeviceMemoryError where it does not fit, ValueError for more host
    layers than there are.
    """
    if isinstance(asked, int) and asked > layers:
        raise ValueError(f"placement asks for {asked} layers on the host, the model has {layers}")
    counts = range(layers + 1) if asked == AUTO else [0 if asked == ALL_DEVICE else asked]
    for count in counts:
        found = Placement(layers, spread(layers, count), layer_bytes, copies)
        if room is None or found.device_bytes <= room:
            taken = count * (host_layer_bytes or layer_bytes)
            if host_room is not None and taken > host_room:
                raise DeviceMemoryError(f"{count} of {layers} layers' KV on the host take {shown_bytes(taken)}, the host has "
                                        f"{shown_bytes(max(host_room, 0))} for this rank; ask for a shorter context")
            return found
    # auto has run through all counts; a layer less on the device is least where none is left there
    least = min((Placement(layers, spread(layers, count), layer_bytes, copies).device_bytes for count in counts), default=0)
    gathered = f" ({copies} times a layer's KV gathered by attention among them)" if copies else ""
    raise DeviceMemoryError(f"the KV cache needs at least {shown_bytes(least)} of the device{gathered}"
                            + (f" with placement {shown(asked)}" if asked != AUTO else ", with all layers' KV on the host")
                            + f", {shown_bytes(max(room, 0))} are left")


def most_layer_bytes(
    layers: int, room: int | None, asked: str | int = AUTO, host_room: int | None = None, copies: int = 0
) -> int | None:
    """The largest layer_bytes that place() takes; None: any."""
    if room is None:
        return None if host_room is None or not isinstance(asked, int) or not asked else host_room // asked
    best = 0
    for count in range(layers + 1) if asked == AUTO else [0 if asked == ALL_DEVICE else asked]:
        unit = Placement(layers, spread(layers, count), 1, copies)
        bound = max(room, 0) // unit.device_bytes
        if unit.host_bytes and host_room is not None:
            bound = min(bound, max(host_room, 0) // unit.host_bytes)
        best = max(best, bound)
    return best


def spread(layers: int, count: int) -> tuple[int, ...]:
    """`count` of `layers` layers, evenly, each as late in its share as can be: the first has most before it."""
    return tuple(-(-(place + 1) * layers // count) - 1 for place in range(count))


def attends_on_host(new_tokens: int) -> bool:
    """Whether a sequence of so many new tokens is attended by the host's processor in host layers, rather than its KV fetched.

    The host reads the KV once for all rows, and from r rows on is bound by arithmetic, F FLOP/s: 4·r·Hq·D a key. The bus takes
    2·Hkv·D·itemsize a key at B bytes/s. They meet at r = (Hkv/Hq) · itemsize · F / (2·B): 16 for a 200 GFLOP/s share of a host,
    16-bit KV, no groups and a 12 GB/s bus. What is certain is that decoding belongs here and a prompt's chunk does not.
    """
    return new_tokens <= HOST_ROWS


def shown(asked: str | int) -> str:
    """The placement as profile and command line spell it."""
    return f"{asked}-host-layers" if isinstance(asked, int) else asked


def runs_of(numbers: Iterable[int]) -> list[range]:
    """Ascending numbers as ranges of those that follow one another."""
    ends: list[list[int]] = []
    for number in numbers:
        if ends and number == ends[-1][1]:
            ends[-1][1] += 1
        else:
            ends.append([number, number + 1])
    return [range(*each) for each in ends]


def ranges(layers: Iterable[int]) -> str:
    """'0-3, 5, 7-8'."""
    return ", ".join(f"{run.start}-{run.stop - 1}" if len(run) > 1 else f"{run.start}" for run in runs_of(layers))


def out_of_memory_text(error: BaseException) -> str | None:
    """What an allocator said, if it is that there is no memory; else None."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in text):
        return text.splitlines()[0]
    return None
