"""Attention of layers whose KV lies in host memory (FastAttention's CPU-GPU cooperation), on any device and with any backend.

A prompt's chunk is attended by the device: what earlier chunks left on the host is fetched into a buffer of the device, the chunk's own K
and V are written behind it, and go to the host while the following layers compute; the next host layer's fetch is on its way by then.
A decoding sequence never moves its KV: q and the new k and v go down, the host's processor stores and attends, o comes up. Which of the
two a sequence gets follows from its new tokens alone (placement.attends_on_host). Buffers have the host pages' shape, so that one block
table serves both, and the kernel sees the same numbers in the same places wherever they lie: placement changes nothing in the results.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from hetero_attn import host_memory
from hetero_attn.collectives.lane import Mark, lanes
from hetero_attn.ops import attention_varlen
from hetero_attn.parallel.pinned import pinned
from hetero_attn.parallel.placement import DeviceMemoryError, Placement
from hetero_attn.parallel.trace import FETCHES, STORES, Recorder
from hetero_attn.profile import DeviceProfile
from hetero_attn.quantity import shown_bytes
from hetero_attn.registry import use_backend, use_profile


class DeviceAccount:
    """What is held of a device, against what may be. limit None: whatever the device has. Raises DeviceMemoryError beyond it.

    On an accelerator its own allocator has the last word. On the CPU, where "device" is a part of the host's memory, this account is the
    only bound, and every tensor of a cache goes through it.
    """

    def __init__(self, limit: int | None = None, held: int = 0) -> None:
        self.limit, self.held, self.peak = limit, held, held

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialised tensor on the device, which counts until it is collected."""
        nbytes = allocated_bytes(torch.Size(shape).numel() * dtype.itemsize, device.type)
        if self.limit is not None and self.held + nbytes > self.limit:
            raise DeviceMemoryError(f"out of device memory: {shown_bytes(nbytes)} more are asked for, {shown_bytes(self.held)} of "
                                    f"{shown_bytes(self.limit)} are held")
        tensor = host_memory.empty(shape, dtype, device)
        self.held += nbytes
        self.peak = max(self.peak, self.held)
        weakref.finalize(tensor, self._give_back, nbytes)
        return tensor

    def _give_back(self, nbytes: int) -> None:
        self.held -= nbytes


def allocated_bytes(nbytes: int, device: str) -> int:
    """What a tensor of nbytes takes: whole huge pages where it is large and on the CPU."""
    page = host_memory.HUGE_PAGE_BYTES if device == "cpu" and nbytes >= host_memory.FROM_BYTES else 1
    return -(-nbytes // page) * page


@dataclass
class Traffic:
    """Bytes so far: KV fetched to the device, chunks' KV stored to the host, and q, k, v and o of attention on the host."""

    fetched: int = 0
    stored: int = 0
    crossed: int = 0


class HostLayers:
    """K and V pages of a placement's host layers, and attention over them. Made with the cache, and collected with it.

    k, v: layer -> pages [num_blocks, block_size, kv_heads, head_dim] in host memory (pinned where the device is not the CPU).
    """

    def __init__(
        self, placement: Placement, shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, account: DeviceAccount,
        windows: Sequence[int | None] = (), profile: DeviceProfile | None = None, traffic: Traffic | None = None,
    ) -> None:
        """windows: of every layer, keys that it sees (None: all). profile: who attends on the host beside a device; None on the CPU, where
        both sides choose as the caller does."""
        self.device, self.profile, self.traffic = device, profile, traffic or Traffic()
        self.k, self.v = ({layer: _host_pages(shape, dtype, device) for layer in placement.host} for _ in "kv")
        self._up, self._down = lanes(device, 2)
        self._buffers = [tuple(self._on_device(account.empty(shape, dtype, device)) for _ in "kv") for _ in range(placement.buffers)]
        self._layers = placement.host
        self._windows = {layer: windows[layer] if windows else None for layer in placement.host}
        self._stored: dict[int, tuple[Mark, int]] = {}         # layer -> its last store, and the pass that began it
        self._used: dict[int, Mark] = {}                       # buffer -> the last store out of it
        self._coming: dict[int, Mark] = {}                     # layer -> its fetch in this pass
        self._pass: Any = None                                 # the whole step that runs
        self._recorder: Recorder | None = None                 # and who takes down its copies
        self._number = 0

    # ---- a pass --------------------------------------------------------------------------------------------------------

    @contextmanager
    def running(self, step: Any, recorder: Recorder | None = None) -> Iterator[None]:
        """A forward pass of the whole step; its parts may come to attend() one by one, layer after layer. recorder: takes down copies and
        the host's attention."""
        self._pass, self._coming, self._number, self._recorder = step, {}, self._number + 1, recorder
        try:
            if step.far:
                self._fetch(0, step)
            yield
        finally:
            self._pass = self._recorder = None

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Any, options: Mapping[str, Any]) -> torch.Tensor:
        """q [T, Hq, D], k, v [T, Hkv, D] of the step's tokens -> what they saw [T, Hq, D]. Stores k and v."""
        if not step.far:
            return self._attend_on_host(layer, q, k, v, step, options)
        if not step.near:
            return self._attend_on_device(layer, q, k, v, step, options)
        out = q.new_empty(q.shape)
        for attend, sequences in ((self._attend_on_device, step.far), (self._attend_on_host, step.near)):
            rows, own = step.among(sequences)
            seen = attend(layer, *(x.index_select(0, rows) for x in (q, k, v)), own, options)
            out.index_copy_(0, rows, seen)
        return out

    # ---- on the host ---------------------------------------------------------------------------------------------------

    def _attend_on_host(self, layer, q, k, v, step, options) -> torch.Tensor:
        stored, number = self._stored.get(layer, (None, 0))
        if stored is not None and (number < self._number or self._pass is None):
            stored.synchronize()                               # perhaps this very sequence's last chunk; in this pass, only others' chunks
        if self.device.type != "cpu":
            heads = [x.shape[1] for x in (q, k, v)]
            joint = torch.cat((q, k, v), dim=1)                                                # [T, Hq + 2 Hkv, D]: one copy, one wait
            landed = torch.empty(joint.shape, dtype=joint.dtype, pin_memory=True).copy_(joint, non_blocking=True)
            torch.get_device_module(self.device).current_stream(self.device).synchronize()
            q, k, v = landed.split(heads, dim=1)
        self.traffic.crossed += sum(x.numel() * x.element_size() for x in (q, q, k, v))
        host = step.on_host
        _write(self.k[layer], self.v[layer], k, v, host.slots)
        told = nullcontext() if self._recorder is None else self._recorder.on_host(f"layers.{layer}", q.shape[0])
        with told, self._choosing():
            seen = _attend(q, self.k[layer], self.v[layer], host, options)
        return seen.to(self.device, non_blocking=True)

    def _choosing(self) -> AbstractContextManager:
        return nullcontext() if self.profile is None else _both(use_profile(self.profile), use_backend(None))

    # ---- on the device -------------------------------------------------------------------------------------------------

    def _attend_on_device(self, layer, q, k, v, step, options) -> torch.Tensor:
        place, alone = self._layers.index(layer), self._pass is None
        number = place % len(self._buffers)
        if alone or layer not in self._coming:                 # alone: a block that is run by itself, to be timed
            self._fetch(place, step if alone else self._pass)
        following = None if alone or place + 1 == len(self._layers) else self._layers[place + 1]
        if following is not None and following not in self._coming:
            self._fetch(place + 1, self._pass)                 # into the buffer that the layer before this one has done with
        self._coming[layer].wait()
        into, pages, runs = self._buffers[number], (self.k[layer], self.v[layer]), step.touched
        _write(*into, k, v, step.slots)
        mark = self._used[number] = self._down.start(self._copies(STORES, layer, pages, into, runs))
        self._stored[layer] = mark, self._number
        self.traffic.stored += _bytes_of(into[0], runs)
        return _attend(q, *into, step, options)

    def _fetch(self, place: int, step: Any) -> None:
        """Begin to copy what the host holds of the step's far sequences, in the layer of that place."""
        layer, number = self._layers[place], place % len(self._buffers)
        into, pages, runs = self._buffers[number], (self.k[layer], self.v[layer]), step.held(self._windows[layer])
        after = [self._stored[layer][0]] if layer in self._stored else []
        if number in self._used:
            after.append(self._used[number])
        self._coming[layer] = self._up.start(self._copies(FETCHES, layer, into, pages, runs), after)
        self.traffic.fetched += _bytes_of(into[0], runs)

    def _copies(self, lane: str, layer: int, into: Sequence[torch.Tensor], source: Sequence[torch.Tensor], runs: Sequence[range]
                ) -> Callable[[], None]:
        """The copying of a layer's blocks, for a lane to do."""

        def work() -> None:
            _copy_runs(into, source, runs)

        if self._recorder is None or not runs:
            return work
        return self._recorder.copying(lane, f"layers.{layer}", sum(map(len, runs)) * into[0].shape[1], work)

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        for lane in (self._up, self._down):
            lane.keep(tensor)
        return tensor


def _host_pages(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Pages in host memory. Raises DeviceMemoryError when the system has none to give."""
    try:
        if device.type == "cpu":
            return host_memory.empty(shape, dtype, "cpu")
        return pinned(shape, dtype, device)
    except RuntimeError as error:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        said = str(error).splitlines()[0]
        raise DeviceMemoryError(f"the host has no {shown_bytes(nbytes)} of memory for a layer's KV ({said})") from None


def _write(pages_k: torch.Tensor, pages_v: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
    pages_k.flatten(0, 1).index_copy_(0, slots, k)
    pages_v.flatten(0, 1).index_copy_(0, slots, v)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Any, options: Mapping[str, Any]) -> torch.Tensor:
    return attention_varlen(q, k, v, step.cu_seqlens_q, None, step.max_seqlen_q, step.max_seqlen_k, block_table=step.block_table,
                            seqused_k=step.seqused_k, **options)


def _copy_runs(into: Sequence[torch.Tensor], source: Sequence[torch.Tensor], runs: Sequence[range]) -> None:
    """Blocks of K and V from one set of pages to the other."""
    for target, origin in zip(into, source):
        for run in runs:
            there, here = target[run.start : run.stop], origin[run.start : run.stop]
            if there.device.type == here.device.type == "cpu":
                # numpy's copy runs on this thread alone: torch's would begin a second set of threads beside the computing one.
                numpy.copyto(there.view(torch.uint8).numpy(), here.view(torch.uint8).numpy())
            else:
                there.copy_(here, non_blocking=True)


def _bytes_of(pages: torch.Tensor, runs: Sequence[range]) -> int:
    return 2 * sum(map(len, runs)) * pages[0].numel() * pages.element_size()


@contextmanager
def _both(first: AbstractContextManager, second: AbstractContextManager) -> Iterator[None]:
    with first, second:
        yield
