"""Fitting a rank into a memory budget: what it needs anyway, what is left for weights, and what that makes of a token's time.

Everything a process holds counts, Python and torch too, because that is what a small machine runs out of. What is there already is read
from the kernel, what is to come is computed; the sum is the predicted peak, and the kernel's own high-water mark (VmHWM) is the answer.
Rates are measured here and now: the disk with all ranks reading at once, the product of real weights, the sum between ranks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hetero_attn import host_memory
from hetero_attn.communicator import Communicator
from hetero_attn.models.cache import PagedCache
from hetero_attn.models.config import ModelConfig, ModelError
from hetero_attn.models.decoder import Decoder
from hetero_attn.models.streaming import Layout, connect, materialise
from hetero_attn.models.weights import Checkpoint
from hetero_attn.parallel.disk import CHUNK, DiskReader
from hetero_attn.parallel.linear import product
from hetero_attn.parallel.residency import Residency, Work, choose, window_bytes, working_bytes
from hetero_attn.parallel.sharding import Partition
from hetero_attn.parallel.window import READERS, WeightWindow
from hetero_attn.quantity import shown_bytes, shown_seconds

PROBE_S = 0.6                   # of reading, for the disk's rate
LATER = 20 << 20                # libraries, tokenizer and Python objects that come after the weights
MIB = 1 << 20
VARIES_MIB = 8                  # a process' own from one start to the next, by huge pages and arenas: a budget that is named works again
SITE = "budget"


@dataclass(frozen=True)
class Rates:
    """What was measured: bytes a second from the disk, seconds for a byte of weight in a one-row product and for one row's all-reduce."""

    disk_bytes_s: float
    product_byte_s: float
    reduce_s: float


@dataclass(frozen=True)
class MemoryPlan:
    """One rank's memory in bytes by part, and the plan for its weights. `predicted` is the peak; budget None: no limit was asked for."""

    parts: dict[str, int]
    residency: Residency
    rates: Rates
    pieces: int
    read_bytes: int                                 # from the disk, a token
    compute_s: float                                # and what a token takes beside reading
    reduce_s: float
    tokens: int                                     # the cache it leaves room for
    budget: int | None = None

    @property
    def predicted(self) -> int:
        return sum(self.parts.values())

    @property
    def disk_s(self) -> float:
        """Seconds a token that the disk alone needs."""
        return self.read_bytes / self.rates.disk_bytes_s

    @property
    def hidden(self) -> bool:
        """Whether loads hide: a token takes hardly longer than the slower of disk and the rest."""
        return self.residency.pass_s <= 1.05 * max(self.disk_s, self.compute_s + self.reduce_s)

    def summary(self, rank: int) -> str:
        """The plan in a line or two."""
        parts = ", ".join(f"{shown_bytes(size)} {name}" for name, size in self.parts.items() if size)
        stays = f"{len(self.residency.resident)} of {self.pieces} slices stay"
        limit = "" if self.budget is None else f" of a budget of {shown_bytes(self.budget)}"
        what = (f"reading {shown_bytes(self.read_bytes)} a token at {self.rates.disk_bytes_s / 1e9:.2f} GB/s takes "
                f"{shown_seconds(self.disk_s)}, the rest {shown_seconds(self.compute_s + self.reduce_s)}, "
                f"together {shown_seconds(self.residency.pass_s)}" if self.read_bytes else "nothing is read for a token")
        return f"rank {rank}: predicted peak {shown_bytes(self.predicted)}{limit} ({parts}); {stays}; {what}"


@dataclass(frozen=True)
class Room:
    """What is asked for: bytes of the whole process (None: no limit), blocks in the window (None: what is quickest), and the cache and
    step that must fit: tokens over sequences, at most `chunk` tokens a step."""

    budget: int | None
    blocks: int | None
    tokens: int
    sequences: int
    chunk: int


def stream(
    decoder: Decoder, checkpoint: Checkpoint, room: Room, device: torch.device, progress: Callable[[int, int], None] | None = None
) -> None:
    """Makes a decoder that is on the meta device run from the disk, within the room. All ranks call it together.

    decoder.memory is the MemoryPlan, decoder.window the WeightWindow. Raises ModelError when the room is too small, WindowError for a file
    that is damaged.
    """
    if decoder.communicator.world_size > 1:                              # rank 0 alone knows the prompts, and their lengths
        cache = torch.tensor([room.tokens, room.sequences], dtype=torch.int64, device=device)
        tokens, sequences = decoder.communicator.broadcast(cache, site=SITE).tolist()
        room = replace(room, tokens=tokens, sequences=sequences)
    layout = Layout(decoder, checkpoint)
    materialise(decoder, layout, device)
    names = set(checkpoint.entries)
    checkpoint.load(layout.held(decoder.shards(names)))
    reader = DiskReader()
    rates = measure(layout, decoder.communicator, decoder.config.hidden_size, decoder.dtype)
    head = bool(len(decoder.lm_head.own)) or decoder.vocabulary == "sharded"
    decoder.memory = plan(layout, rates, decoder, room, head=head)
    found = decoder.memory.residency
    window = WeightWindow(layout.pieces, found.ring_bytes, found.resident, reader=reader)
    connect(decoder, layout, checkpoint, window)
    window.start(progress)


def resident_bytes() -> int:
    """VmRSS of this process; 0 where /proc does not tell."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """VmHWM: the most this process ever held at once; 0 where /proc does not tell."""
    return _status("VmHWM")


def _status(name: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


def cache_bytes(config: ModelConfig, partition: Partition, tokens: int, sequences: int, block_size: int, dtype: torch.dtype) -> int:
    """What the KV cache of a rank takes when it is full of `tokens` tokens of up to `sequences` sequences."""
    blocks = PagedCache.blocks_for(tokens, sequences, block_size)
    one = blocks * block_size * len(partition.kv_heads) * config.head_dim * dtype.itemsize
    page = host_memory.HUGE_PAGE_BYTES if one >= host_memory.FROM_BYTES else 1
    return 2 * config.layers * -(-one // page) * page


def activation_bytes(config: ModelConfig, partition: Partition, tokens: int, sequences: int, dtype: torch.dtype, *, head: bool) -> int:
    """What one step of `tokens` tokens holds beside weights and cache: residual stream, intermediates, sums on their way, logits."""
    heads = (len(partition.q_heads) * 2 + 2 * len(partition.kv_heads)) * config.head_dim
    stream = tokens * (6 * config.hidden_size + 2 * heads + 4 * len(partition.ffn)) * dtype.itemsize
    sums = 2 * partition.world_size * tokens * config.hidden_size * dtype.itemsize if partition.world_size > 1 else 0
    logits = sequences * config.vocab_size * (2 * dtype.itemsize + 3 * 4) if head else 0
    return stream + sums + logits


def measure(layout: Layout, communicator: Communicator, hidden: int, dtype: torch.dtype) -> Rates:
    """All ranks together: the disk under everybody's reads, so that ranks of one host find each its share of a disk; a product; a sum. No
    more than the smallest window is in memory meanwhile."""
    works = [index for index, piece in enumerate(layout.pieces) if piece.nbytes]
    if not works:
        return Rates(float("inf"), 0.0, _reduce_seconds(communicator, hidden, dtype))
    # Without checksums: they are compared once, and what is asked here is how quick a later pass is.
    window = WeightWindow([replace(piece, checks=()) for piece in layout.pieces], working_bytes(layout.pieces))
    try:
        window.start()
        product_byte_s = _product_seconds(layout, window, dtype)
        # Somewhere else each time: what was read a moment ago may come quicker, from a cache below us.
        first = place = time.time_ns() // 1_000_000 % len(works)
        window.take(works[place])
        window.give_back(works[place])
        communicator.barrier(site=SITE)
        began, before = time.perf_counter(), window.reader.read_bytes
        while (elapsed := time.perf_counter() - began) < PROBE_S and place - first < 64 * len(works):
            place += 1
            window.take(works[place % len(works)])
            window.give_back(works[place % len(works)])
        rate = (window.reader.read_bytes - before) / max(elapsed, 1e-9)
        # The better of two at some distance: what disturbs a machine lasts longer than a few products.
        product_byte_s = min(product_byte_s, _product_seconds(layout, window, dtype))
    finally:
        window.close()
    return Rates(max(rate, 1.0), product_byte_s, _reduce_seconds(communicator, hidden, dtype))


def _product_seconds(layout: Layout, window: WeightWindow, dtype: torch.dtype) -> float:
    """Seconds a byte of weight, of the first layer's products with one row: each run once, as the disk left it, since a run that was
    multiplied a moment ago lies in the processor's cache."""
    found, known = [], set()
    for module, indices in layout.users[:4]:
        for index in indices:
            for weight in window.take(index):
                if not weight.numel():
                    continue
                other = None
                if weight.dim() == 3:                                    # experts: one is like another
                    weight, other = weight[0], weight[-1]
                x = torch.ones(1, weight.shape[1], dtype=dtype)
                if weight.shape not in known:                            # the first of a shape may compile a kernel
                    product(module.linear, x, torch.zeros_like(weight) if other is None else other)
                    known.add(weight.shape)
                began = time.perf_counter()
                product(module.linear, x, weight)
                found.append((time.perf_counter() - began) / weight.nbytes)
            window.give_back(index)
    return statistics.median(found) if found else 0.0


def _reduce_seconds(communicator: Communicator, hidden: int, dtype: torch.dtype) -> float:
    if communicator.world_size == 1:
        return 0.0
    row, times = torch.ones(1, hidden, dtype=dtype, device=communicator.device), []
    for _ in range(7):
        began = time.perf_counter()
        communicator.all_reduce(row, site=SITE)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def works_of(layout: Layout, rates: Rates, experts_share: float = 1.0) -> list[Work]:
    """The pieces with their times. experts_share: of the experts, those that a token goes through."""
    found = []
    for piece in layout.pieces:
        share = experts_share if piece.name.endswith(".experts") else 1.0
        seconds = share * piece.nbytes * rates.product_byte_s
        found.append(Work(piece.nbytes, piece.read_bytes, seconds, rates.reduce_s if piece.ends_block else 0.0, piece.ends_block))
    return found


def plan(layout: Layout, rates: Rates, decoder: Decoder, room: Room, *, head: bool) -> MemoryPlan:
    """The plan for this rank; all ranks call it together. Without a budget nothing stays, and the window is as asked for.

    Raises ModelError, on every rank alike, when a budget is too small, with the smallest that works.
    """
    config, partition, dtype = decoder.config, decoder.partition, decoder.dtype
    works = works_of(layout, rates, config.experts_per_token / config.experts if config.experts else 1.0)
    wanted = None if room.blocks is None else window_bytes(works, room.blocks)
    fixed = {
        "Python, torch and libraries": resident_bytes() + LATER,
        "KV cache": cache_bytes(config, partition, room.tokens, room.sequences, decoder.kv_block_size, dtype),
        "activations": activation_bytes(config, partition, min(room.chunk, room.tokens), room.sequences, dtype, head=head),
        "read buffers": (READERS + 1) * CHUNK + (1 << 20),
    }
    needed = sum(fixed.values()) + max(working_bytes(works), wanted or 0)
    _refuse_small(decoder.communicator, room.budget, needed)
    ring = wanted
    left = needed - sum(fixed.values()) if room.budget is None else room.budget - sum(fixed.values())
    found = choose(works, left, rates.disk_bytes_s, ring_bytes=ring)
    stays = sum(works[index].nbytes for index in found.resident)
    return MemoryPlan(
        parts=fixed | {"window": found.ring_bytes, "resident weights": stays}, residency=found, rates=rates, pieces=len(works),
        read_bytes=found.read_bytes(works), compute_s=sum(work.compute_s for work in works), reduce_s=sum(work.reduce_s for work in works),
        tokens=room.tokens, budget=room.budget,
    )


def _refuse_small(communicator: Communicator, budget: int | None, needed: int) -> None:
    """Every rank hears of every rank that cannot: one line, the same everywhere."""
    own = torch.tensor([[budget or 0, needed]], dtype=torch.int64, device=communicator.device)
    every = own if communicator.world_size == 1 else communicator.all_gather(own, sizes=[1] * communicator.world_size, site=SITE)
    short = [(rank, given, least) for rank, (given, least) in enumerate(every.tolist()) if given and least > given]
    if short:
        smallest = max(least for _, _, least in short)
        lines = "; ".join(f"rank {rank} has {shown_bytes(given)} and needs {shown_bytes(-(-least // MIB) * MIB)}"
                          for rank, given, least in short)
        raise ModelError(f"the memory budget is too small: {lines} (Python and torch, KV cache, activations and the smallest window); "
                         f"the smallest that works is {-(-smallest // MIB) + VARIES_MIB}MiB; or ask for fewer new tokens, or take "
                         "more ranks")
