"""How large the weight window is and which pieces stay in memory: pure Python, from sizes and measured rates.

A token takes as long as the slowest of three things that go on side by side: reading what does not stay, multiplying, and the sums between
ranks. More memory for the ring lets reads run further ahead; more for residents leaves less to read. Which of the two helps is found by
running a pass on paper, as the window does it. steady() is TPI-LLM's own criterion, for blocks and a window of unlimited depth.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from hetero_attn.parallel.disk import ALIGN

CANDIDATES = 24                 # sizes of the ring that are tried
SLACK_S = 0.05                  # of reading that the ring has room for before anything stays: ranks wait for one another, and are late by
                                # what else runs (7B shape, 2 ranks on 2 cores: with a ring of 10 MiB a token took 1.19 of its limit)
ENOUGH = 1.005                  # of two plans within half a per cent, the one with the smaller ring


@dataclass(frozen=True)
class Steady:
    """Whether loads hide behind a pass. tight: each behind the block before it (a window of 2). loose: none ever holds up a pass, for a
    window that is deep enough. first, second: the first layer from 1 on at which each of its two forms fails, 0 = none."""

    tight: bool
    loose: bool
    balance: bool
    first: int
    second: int


def steady(t_attn: float, t_ffn: float, t_ar: float, load_attn: float, load_ffn: float, layers: int) -> Steady:
    """TPI-LLM's steady-state conditions (section 3.3). Times of one block in any unit: compute t_attn, t_ffn; one all-reduce t_ar; loading.

    loose: t_attn + t_ffn + 2·t_ar >= τ_ffn + τ_attn, and for every l <= layers one of
        l·t_attn + (l−1)·t_ffn + (2l−1)·t_ar >= l·τ_ffn + (l−1)·τ_attn
        (l−1)·t_attn + l·t_ffn + (2l−1)·t_ar >= (l−1)·τ_ffn + l·τ_attn
    tight: t_attn + t_ar >= τ_ffn and t_ffn + t_ar >= τ_attn.
    """
    tight = t_attn + t_ar >= load_ffn and t_ffn + t_ar >= load_attn
    balance = t_attn + t_ffn + 2 * t_ar >= load_ffn + load_attn

    def first_form(l: int) -> bool:
        return l * t_attn + (l - 1) * t_ffn + (2 * l - 1) * t_ar >= l * load_ffn + (l - 1) * load_attn

    def second_form(l: int) -> bool:
        return (l - 1) * t_attn + l * t_ffn + (2 * l - 1) * t_ar >= (l - 1) * load_ffn + l * load_attn

    steps = range(1, layers + 1)
    each = all(first_form(l) or second_form(l) for l in steps)
    fails = [next((l for l in steps if not form(l)), 0) for form in (first_form, second_form)]
    return Steady(tight, balance and each, balance, *fails)


def paper_peak(hidden: int, vocab: int, ffn: int, group: int, share: float, window: int, *, master: bool) -> float:
    """TPI-LLM's peak in parameters: h hidden, v vocabulary, s ffn, a/b = group query heads a KV head, p share of this rank, w window."""
    attention = 2 * (1 + 1 / group) * hidden**2 * share + hidden
    mlp = 3 * hidden * ffn * share + hidden
    if not master:
        return window // 2 * attention + (window + 1) // 2 * mlp
    return 2 * hidden * vocab + hidden + ((window - 2) // 2 * attention + (window - 1) // 2 * mlp if window >= 3 else 0)


@dataclass(frozen=True)
class Work:
    """One piece of a pass: bytes in memory and from the disk, seconds of its product, and of the sum that follows it. ends_block: a sum
    follows, which takes no time on one rank."""

    nbytes: int
    read_bytes: int
    compute_s: float
    reduce_s: float = 0.0
    ends_block: bool = False


def pass_seconds(works: Sequence[Work], ring_bytes: int, resident: frozenset[int], disk_bytes_s: float, passes: int = 4) -> float:
    """Seconds of a pass once the window is in its stride. Raises ValueError where the ring cannot hold a piece that is not resident."""
    order = [index for index, work in enumerate(works) if index not in resident and work.nbytes]
    if any(works[index].nbytes > ring_bytes for index in order):
        raise ValueError(f"a ring of {ring_bytes} bytes is smaller than a piece that has to go through it")
    loaded = _Ring(ring_bytes)
    now, ends = 0.0, []
    for _ in range(passes):
        for index, work in enumerate(works):
            if index in resident or not work.nbytes:
                now += work.compute_s + work.reduce_s
                continue
            now = max(now, loaded.load(work.nbytes, work.read_bytes / disk_bytes_s)) + work.compute_s
            loaded.freed.append(now)
            now += work.reduce_s
        ends.append(now)
    return (ends[-1] - ends[0]) / (passes - 1)


class _Ring:
    """The reader's side of the window: when each piece is whole, given when those before it were given back (`freed`)."""

    def __init__(self, size: int) -> None:
        self.size, self.head, self.clock = size, 0, 0.0
        self.starts: list[int] = []
        self.freed: list[float] = []
        self._oldest = 0

    def load(self, nbytes: int, seconds: float) -> float:
        """When the next piece of nbytes, which takes `seconds` to read, is whole."""
        start = self.head
        if start % self.size + nbytes > self.size:
            start += self.size - start % self.size
        done = 0
        while done < nbytes:
            # Up to here the bytes are free as long as the oldest piece is still in use.
            room = nbytes if self._oldest >= len(self.starts) else min(nbytes, self.starts[self._oldest] + self.size - start)
            if room > done:
                self.clock += seconds * (room - done) / nbytes
                done = room
            else:
                self.clock = max(self.clock, self.freed[self._oldest])
                self._oldest += 1
        self.starts.append(start)
        self.head = start + nbytes
        return self.clock


@dataclass(frozen=True)
class Residency:
    """A plan: bytes of the ring, the pieces that stay, and the seconds of a pass that it should take."""

    ring_bytes: int
    resident: frozenset[int]
    pass_s: float

    def weight_bytes(self, works: Sequence[Work]) -> int:
        return self.ring_bytes + sum(works[index].nbytes for index in self.resident)

    def read_bytes(self, works: Sequence[Work]) -> int:
        """Bytes read from the disk in a pass."""
        return sum(work.read_bytes for index, work in enumerate(works) if index not in self.resident)


def least_bytes(works: Sequence[Work]) -> int:
    """The smallest ring: the largest piece."""
    return max((work.nbytes for work in works), default=0)


def working_bytes(works: Sequence[Work]) -> int:
    """The smallest ring in which a piece is read while the one before it is multiplied: any two in a row. Of works: nbytes alone."""
    sizes = [work.nbytes for work in works if work.nbytes]
    return max((one + other for one, other in zip(sizes, sizes[1:] + sizes[:1])), default=0) if len(sizes) > 1 else sum(sizes)


def spread(works: Sequence[Work], nbytes: int) -> frozenset[int]:
    """Pieces for nbytes of memory, evenly over the pass, so that reads are never far from what is wanted next."""
    total = sum(work.nbytes for work in works)
    if total <= nbytes:
        return frozenset(range(len(works)))
    chosen, saved, left = set(), 0.0, nbytes
    for index, work in enumerate(works):
        saved += work.nbytes * nbytes / total
        if work.nbytes and saved >= work.nbytes and work.nbytes <= left:
            chosen.add(index)
            saved -= work.nbytes
            left -= work.nbytes
    for index, work in sorted(enumerate(works), key=lambda entry: -entry[1].nbytes):           # what the rounding left over
        if index not in chosen and 0 < work.nbytes <= left:
            chosen.add(index)
            left -= work.nbytes
    return frozenset(chosen)


def window_bytes(works: Sequence[Work], blocks: int) -> int:
    """The ring that holds any `blocks` blocks in a row: a block is what lies between two sums, the paper's unit of a window."""
    sizes, block = [], 0
    for work in works:
        block += work.nbytes
        if work.ends_block or work.reduce_s or work is works[-1]:
            sizes.append(block)
            block = 0
    sizes = sizes or [block]
    twice = sizes + sizes
    return max(sum(twice[place : place + min(blocks, len(sizes))]) for place in range(len(sizes)))


def choose(works: Sequence[Work], weight_bytes: int, disk_bytes_s: float, *, ring_bytes: int | None = None) -> Residency:
    """The plan with the shortest pass among those that fit into weight_bytes. ring_bytes: a ring that was asked for.

    Raises ValueError when even the smallest ring does not fit.
    """
    total, least = sum(work.nbytes for work in works), least_bytes(works)
    if total <= weight_bytes and ring_bytes is None:
        everything = frozenset(range(len(works)))
        return Residency(0, everything, sum(work.compute_s + work.reduce_s for work in works))
    if max(least, ring_bytes or 0) > weight_bytes:
        raise ValueError(f"{weight_bytes} bytes cannot hold a window of {max(least, ring_bytes or 0)}")
    if ring_bytes is not None:
        sizes = [max(least, ring_bytes)]
    else:
        most = min(weight_bytes, total)
        least = max(least, min(most, int(disk_bytes_s * SLACK_S)) // ALIGN * ALIGN)
        steps = [least * (most / least) ** (step / (CANDIDATES - 1)) for step in range(CANDIDATES)]
        # Where whole blocks fit one after the other, none is lost at the ring's end.
        whole = [window_bytes(works, blocks) for blocks in range(1, 9)]
        sizes = sorted({min(int(size) // ALIGN * ALIGN, most) for size in (*steps, *whole) if least <= size <= most} | {least})
    best: Residency | None = None
    for size in sizes:
        resident = spread(works, weight_bytes - size)
        seconds = pass_seconds(works, size, resident, disk_bytes_s)
        if best is None or seconds * ENOUGH < best.pass_s:
            best = Residency(size, resident, seconds)
    assert best is not None
    return best


def blocks(works: Sequence[Work]) -> list[tuple[int, int]]:
    """(first piece, past the last) of each block."""
    ends = [index + 1 for index, work in enumerate(works) if work.ends_block or work.reduce_s or index + 1 == len(works)]
    return list(itertools.pairwise([0, *ends]))
