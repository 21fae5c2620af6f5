"""The cost model: what a collective loads on the busiest rank and its link, and how long that takes on a link of given numbers.

    seconds = hops·α + bytes/B + max(root bytes/B_root, messages·o + all ranks' messages·p) + coded bytes·c

α is one latency, B what a rank's link carries while all ranks send, B_root what one rank takes in from all at once, o the cost of every
message sent or received on the busiest rank, p what any message costs everybody (ranks that share processors), c what a codec takes for a
byte of values. After TPI-LLM's model, which leaves out messages; gloo does not. A root sees to some messages while others' bytes still
pass its link, so of the two the longer counts; where all ranks send at once their processors and links take turns, and both count (star,
8 ranks, 300 Mbit/s, 1 ms, 2 KiB to 1 MiB: the sum is up to 37 % above the clock, the longer within 11 %). Pure functions: the numbers come
from link.py, and what they predict is checked against the clock in tuning.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hetero_attn.collectives.choice import NATIVE, PLAIN, Route
from hetero_attn.collectives.direct import RUNS_MOST
from hetero_attn.collectives.wire import AHEAD_BYTES

# What is worth considering; two_shot's and doubling's reduce_scatter and all_gather are one_shot's.
CANDIDATES = {
    "all_reduce": ("one_shot", "two_shot", "star", "ring", "tree", "doubling", NATIVE),
    "reduce_scatter": ("one_shot", "star", "ring", "tree", NATIVE),
    "all_gather": ("one_shot", "star", "ring", "tree", NATIVE),
    "broadcast": ("one_shot", "two_shot", "ring", "tree", NATIVE),
}


class Load(NamedTuple):
    """What a call asks of the busiest rank. hops: latencies one after the other; nbytes, root_bytes: through its link; messages: sent and
    received; coded: bytes of values that go through a codec. crowd: messages sent and received by all ranks together."""

    hops: float = 0.0
    nbytes: float = 0.0
    root_bytes: float = 0.0
    messages: float = 0.0
    coded: float = 0.0
    crowd: float = 0.0


@dataclass(frozen=True)
class LinkModel:
    """The link's numbers, in seconds and bytes: α, 1/B, 1/B_root, o, p."""

    latency_s: float
    byte_s: float
    root_byte_s: float
    message_s: float
    crowd_s: float = 0.0

    def seconds(self, load: Load, coded_byte_s: float = 0.0) -> float:
        """How long a load takes; coded_byte_s: the codec's seconds for a byte of values."""
        return (load.hops * self.latency_s + load.nbytes * self.byte_s + load.coded * coded_byte_s
                + max(load.root_bytes * self.root_byte_s, load.messages * self.message_s + load.crowd * self.crowd_s))


class CodecCost(NamedTuple):
    """A codec for the model: bytes on the wire for a byte of values, seconds to encode or decode a byte of values, and what each
    encoding or decoding takes besides, whatever its length: short messages gain nothing by a codec on a fast link."""

    ratio: float
    byte_s: float
    call_s: float = 0.0


def codings(algorithm: str, world_size: int) -> int:
    """How many payloads the busiest rank encodes and decodes in a coded sum."""
    return {"one_shot": world_size + 1, "two_shot": 3 * world_size + 1, "star": world_size + 3}[algorithm]


def load(operation: str, algorithm: str, world_size: int, nbytes: float, *, widening: float = 1.0, ratio: float = 1.0) -> Load:
    """The load of a collective over `world_size` ranks of a tensor of nbytes (all_gather: the result).

    widening: how much wider travelling partial sums are than the tensor (2 for 16-bit floats). ratio: bytes on the wire for a byte of the
    tensor, below 1 with a codec. gloo's own collectives post their receives late, which doubles their hops.
    """
    others, whole, share = world_size - 1, float(nbytes), nbytes / world_size
    if not others:
        return Load()
    levels = others.bit_length()                     # ceil(log2 N): the children of a tree's root
    depth = max(rank.bit_count() for rank in range(world_size))        # and how far the furthest rank is from it
    steps = world_size.bit_length() - 1              # of doubling, and whether ranks beyond a power of two have one before and one after
    folded = world_size != 1 << steps
    packed, coded = whole * ratio, ratio != 1.0
    found = {
        ("all_reduce", "one_shot"): Load(1, others * packed, 0, 2 * others, coded * (world_size + 1) * whole),
        ("all_reduce", "two_shot"): Load(2, 2 * others * packed / world_size, 0, 4 * others, coded * (3 * whole + share)),
        ("all_reduce", "star"): Load(2, 0, 2 * others * packed, 2 * others, coded * (world_size + 2) * whole),
        ("all_reduce", "ring"): Load(2 * others, others * share * (1 + widening), 0, 4 * others),
        ("all_reduce", "tree"): Load(2 * depth, levels * whole * (1 + widening), 0, 2 * (levels + depth)),
        ("all_reduce", "doubling"): Load(steps + 2 * folded, whole * (steps * widening + folded * (1 + widening)), 0,
                                         2 * (steps + folded)),
        ("all_reduce", NATIVE): Load(4 * others, 2 * others * share, 0, 4 * others),
        ("reduce_scatter", "one_shot"): Load(1, others * share * ratio, 0, 2 * others, coded * 2 * whole),
        ("reduce_scatter", "star"): Load(2, 0, others * (packed + share * ratio), 2 * others, coded * (world_size + 2) * whole),
        ("reduce_scatter", "ring"): Load(others, others * share * widening, 0, 2 * others),
        ("reduce_scatter", "tree"): Load(2 * depth, levels * whole * widening + others * share, 0, 2 * (levels + depth)),
        ("reduce_scatter", NATIVE): Load(2, others * share, 0, 2 * others),
        ("all_gather", "one_shot"): Load(1, others * share, 0, 2 * others),
        ("all_gather", "star"): Load(2, 0, others * (share + whole), 2 * others),
        ("all_gather", "ring"): Load(others, others * share, 0, 2 * others),
        ("all_gather", "tree"): Load(2 * depth, others * share + levels * whole, 0, 2 * (levels + depth)),
        ("all_gather", NATIVE): Load(2 * others, others * share, 0, 2 * others),
        ("broadcast", "one_shot"): Load(1, 0, others * whole, others + 1),
        ("broadcast", "two_shot"): Load(2, 0, 2 * others * share + (others - 1) * share, 3 * others),
        ("broadcast", "ring"): Load(others, whole + (others - 1) * share, 0, 2 * world_size + others),
        ("broadcast", "tree"): Load(depth, levels * whole, 0, levels + depth),
        ("broadcast", NATIVE): Load(2 * depth, levels * whole, 0, levels + depth),
    }
    nearest = {("broadcast", "star"): "one_shot", ("broadcast", "doubling"): "tree"}
    nearest |= {(each, name): "one_shot" for each in ("reduce_scatter", "all_gather") for name in ("two_shot", "doubling")}
    asked = (operation, nearest.get((operation, algorithm), algorithm))
    each = share if algorithm in ("two_shot", "ring") or operation in ("reduce_scatter", "all_gather") else whole
    if asked == ("all_reduce", "one_shot"):
        each = whole / RUNS_MOST                     # what a run's message costs is hidden behind the bytes of the others
    late = algorithm != NATIVE and each * ratio > AHEAD_BYTES            # receives of long messages are posted as the call begins
    # Where all pairs talk, or neighbours in step, every rank is as busy as the busiest; in a star or a tree each message has two ends.
    everywhere = (asked[1] in ("one_shot", "two_shot", "ring", "doubling", NATIVE) and operation != "broadcast") or asked[1] == "two_shot"
    ends = world_size * found[asked].messages if everywhere else (2 if operation == "broadcast" else 4) * others
    return found[asked]._replace(hops=found[asked].hops + late, crowd=ends)


def predict(
    link: LinkModel, operation: str, route: Route, world_size: int, nbytes: int, *, widening: float = 1.0, codec: CodecCost | None = None
) -> float:
    """Seconds of a call on a link. codec: the cost of route.codec where that is not 'none'."""
    if route.codec == PLAIN:
        return link.seconds(load(operation, route.algorithm, world_size, nbytes, widening=widening))
    if codec is None:
        raise ValueError(f"codec is {route.codec!r}, expected its CodecCost beside it")
    seconds = link.seconds(load(operation, route.algorithm, world_size, nbytes, ratio=codec.ratio), codec.byte_s)
    return seconds + codec.call_s * codings(route.algorithm, world_size)


def fit(samples: Sequence[tuple[Load, float]]) -> LinkModel:
    """The link whose predictions come nearest to the samples (load, seconds), by relative error, no number below 0.

    Least squares, reweighted towards the least sum of deviations, since one sample in ten meets a busy machine. Raises ValueError without
    samples.
    """
    if not samples:
        raise ValueError("a link is fitted to measured samples, got none")
    terms = torch.tensor([[each.hops, each.nbytes, each.root_bytes, each.messages, each.crowd] for each, _ in samples], dtype=torch.float64)
    rows = terms / torch.tensor([[seconds] for _, seconds in samples], dtype=torch.float64)            # each sample's target is 1
    scale = rows.abs().amax(0).clamp(min=1e-300)
    rows = rows / scale
    rooted, weights = rows[:, 2] > 0, torch.ones(len(samples), dtype=torch.float64)
    counted = rows
    for _ in range(12):
        solution = _least_squares(counted, weights)
        by_bytes = rows[:, 2] * solution[2] > rows[:, 3:] @ solution[3:]                                # of a root's two the longer counts
        counted = rows.clone()
        counted[rooted & ~by_bytes, 2] = 0
        counted[(rooted & by_bytes).nonzero(), torch.tensor([3, 4])] = 0
        weights = 1.0 / (counted @ solution - 1).abs().clamp(min=0.03)
    latency_s, byte_s, root_byte_s, message_s, crowd_s = (solution / scale).tolist()
    return LinkModel(latency_s, byte_s, root_byte_s or byte_s, message_s, crowd_s)


def _least_squares(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The non-negative x that minimises sum of weights·(rows x - 1)^2. With five unknowns every set of zeros can be tried."""
    best, least = torch.zeros(rows.shape[1], dtype=rows.dtype), torch.inf
    root = weights.sqrt()
    for kept in range(1, 1 << rows.shape[1]):
        columns = [index for index in range(rows.shape[1]) if kept >> index & 1]
        part = torch.linalg.lstsq(rows[:, columns] * root[:, None], root[:, None], driver="gelsd").solution[:, 0]
        residual = (weights * (rows[:, columns] @ part - 1) ** 2).sum().item()
        if (part >= 0).all() and residual < least - 1e-12:
            best, least = torch.zeros_like(best), residual
            best[columns] = part
    return best


def as_settings(link: LinkModel) -> dict[str, float]:
    """A link as the profile holds it: milliseconds and 10^6 bit/s, four figures."""
    rounded = {"latency_ms": link.latency_s * 1e3, "message_ms": link.message_s * 1e3, "crowd_ms": link.crowd_s * 1e3}
    if link.byte_s > 0:
        rounded["bandwidth_mbps"] = 8e-6 / link.byte_s
    if link.root_byte_s > 0:
        rounded["root_mbps"] = 8e-6 / link.root_byte_s
    return {name: float(f"{value:.4g}") for name, value in rounded.items()}


def from_settings(
    latency_ms: float, message_ms: float, crowd_ms: float, bandwidth_mbps: float | None, root_mbps: float | None
) -> LinkModel:
    """The link of as_settings()'s numbers; None = no limit that could be measured."""
    return LinkModel(latency_ms * 1e-3, 8e-6 / bandwidth_mbps if bandwidth_mbps else 0.0, 8e-6 / root_mbps if root_mbps else 0.0,
                     message_ms * 1e-3, crowd_ms * 1e-3)


