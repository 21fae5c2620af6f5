"""Who gets how much of the model when devices are unlike: in proportion to speed, as far as each one's memory and disk allow.

A layer is over when its slowest rank is, so the best shares make all ranks take the same time. What a rank takes for a share is its
product, or reading what does not fit into its memory if that is longer; the share it manages within a time T grows with T, and the smallest
T at which all shares together make the whole is found by halving. Heads go in whole KV groups while there are enough of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hetero_attn.parallel.sharding import Partition, split_heads

FFN_GRAIN = 64                  # columns: rows of down stay in whole cache lines, and parts of a tile are few
HALVINGS = 60


@dataclass(frozen=True)
class Speed:
    """What planning knows of a rank: bytes a second that its products read, bytes for weights, bytes a second from its disk (0: it does
    not stream, so what does not fit cannot be its share)."""

    bytes_s: float
    room: float
    disk_bytes_s: float = 0.0

    def seconds(self, nbytes: float) -> float:
        """For a token through `nbytes` of weights; infinite where they neither fit nor stream."""
        beyond = max(0.0, nbytes - self.room)
        if beyond and not self.disk_bytes_s:
            return math.inf
        return max(nbytes / self.bytes_s, beyond / self.disk_bytes_s if beyond else 0.0)

    def bytes_within(self, seconds: float) -> float:
        """The most weights that a token gets through in that time."""
        return min(self.bytes_s * seconds, self.room + self.disk_bytes_s * seconds)


def shares(total: float, speeds: Sequence[Speed]) -> list[float]:
    """Each rank's share of `total` bytes of weights, which add up to 1. Raises ValueError where the ranks together cannot hold them."""
    if not any(each.disk_bytes_s for each in speeds):
        room = sum(max(0.0, each.room) for each in speeds)
        if room < total:
            raise ValueError(f"the weights take {total / 2**30:.2f} GiB, the ranks together have room for {room / 2**30:.2f} GiB and none "
                             "streams from a disk; add ranks or memory, or give a disk's rate (disk_gbps)")
    low, high = 0.0, total / min(each.bytes_s for each in speeds) + sum(total / each.disk_bytes_s for each in speeds if each.disk_bytes_s)
    high *= 2
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if sum(max(0.0, each.bytes_within(middle)) for each in speeds) < total:
            low = middle
        else:
            high = middle
    parts = [max(0.0, each.bytes_within(high)) for each in speeds]
    return [part / sum(parts) for part in parts]


def proportional(total: int, weights: Sequence[float], *, least: int = 0, grain: int = 1) -> list[int]:
    """`total` things in proportion to weights, whole multiples of `grain` (but for one remainder), at least `least` each.

    Largest remainders first; of equals the earlier rank. Raises ValueError when there are too few.
    """
    if least * len(weights) > total:
        raise ValueError(f"{total} cannot be divided over {len(weights)} ranks with at least {least} each")
    grain = grain if total // grain >= 4 * len(weights) else 1           # few things are divided finely
    units, floor = total // grain, -(-least // grain)
    free = units - floor * len(weights)
    ideal = [max(0.0, weight * units / sum(weights) - floor) for weight in weights]
    scale = free / sum(ideal) if sum(ideal) else 0.0
    ideal = [each * scale for each in ideal]
    counts = [floor + int(each + 1e-9) for each in ideal]
    order = sorted(range(len(weights)), key=lambda rank: (-(ideal[rank] - int(ideal[rank] + 1e-9)), rank))
    for place in range(units - sum(counts)):
        counts[order[place % len(order)]] += 1
    counts = [count * grain for count in counts]
    counts[max(range(len(weights)), key=lambda rank: weights[rank])] += total - sum(counts)
    return counts


def ranges(counts: Sequence[int]) -> list[range]:
    """Counts as consecutive ranges from 0."""
    found, start = [], 0
    for count in counts:
        found.append(range(start, start + count))
        start += count
    return found


def uneven(weights: Sequence[float], *, q_heads: int, kv_heads: int, ffn: int, vocab: int, vocabulary: str) -> tuple[Partition, ...]:
    """Every rank's part, heads, FFN columns and vocabulary rows in proportion to weights.

    Raises ValueError for more ranks than query heads. With more ranks than KV heads the heads are split evenly, and the columns alone
    make up for unlike speed.
    """
    world_size = len(weights)
    if world_size <= kv_heads:
        group = q_heads // kv_heads
        heads = [(range(kv.start * group, kv.stop * group), kv) for kv in ranges(proportional(kv_heads, weights, least=1))]
    else:
        heads = split_heads(q_heads, kv_heads, world_size)
    # What the heads' rounding gave one rank too much, the columns take away again: both are work for the same layer.
    got = [len(q) / q_heads for q, _ in heads]
    wanted = [weight / sum(weights) for weight in weights]
    columns = proportional(ffn, [max(1e-6, 1.5 * want - 0.5 * have) for want, have in zip(wanted, got)], grain=FFN_GRAIN)
    if vocabulary == "sharded":
        rows = proportional(vocab, weights, grain=FFN_GRAIN)
    else:
        rows = [vocab] + [0] * (world_size - 1)
    counts = tuple(rows) if vocabulary == "sharded" else ()
    return tuple(
        Partition(rank, world_size, vocabulary, *heads[rank], own, mine, counts)
        for rank, (own, mine) in enumerate(zip(ranges(columns), ranges(rows)))
    )
