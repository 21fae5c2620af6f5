"""A prefill's partial sums, 512 x 4096 bf16, over emulated links: what the low-bit codecs save in bytes and in time.

Bytes are counted twice: those handed to torch.distributed, our headers, factors and status bytes included, and those that the rank's
interface counted, TCP's headers and acknowledgements included. Every coded sum is compared with the true one. Each call begins after a
barrier, since a prefill's layers compute long between two of them.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from cpu.verdicts import Verdict
from links import links

from collectives import bars
from collectives.emulated import RATE_MBIT
from collectives.ranks import join, slowest
from hetero_attn.collectives.choice import Choice, Fixed, Route
from hetero_attn.collectives.codec.calibration import Calibration, SiteRanges

TOKENS, HIDDEN, SITE = 512, 4096, "layers.0.down_proj"
CODEC = "int4_outliers"
DELAY_MS = 1.0
RANKS = (2, 4)
PLAIN = tuple(Route(name) for name in ("one_shot", "two_shot", "ring"))
CODED = tuple(Route(name, codec) for codec in (CODEC, "int4_group32", "int8_group32") for name in ("one_shot", "two_shot"))


@dataclass(frozen=True)
class Payload:
    """One way for the sum: seconds, bits a value handed to torch.distributed and by the interface's counter, error relative to the sum's
    root mean square. bits are None where a way is gloo's own."""

    ranks: int
    algorithm: str
    codec: str
    seconds: float
    bits: float | None
    interface_bits: float
    error: float


@dataclass(frozen=True)
class Payloads:
    """All ways. auto: ranks -> what `codec: auto` picks for this sum."""

    ways: list[Payload]
    auto: dict[int, str]

    def best_plain(self, ranks: int) -> Payload:
        """Our quickest bf16 algorithm."""
        return min((each for each in self.ways if (each.ranks, each.codec) == (ranks, "none") and each.bits is not None),
                   key=lambda each: each.seconds)

    def verdicts(self) -> list[Verdict]:
        lines = []
        for each in self.ways:
            if each.codec != CODEC:
                continue
            about = f"{CODEC}, {'quantise-once' if each.algorithm == 'one_shot' else 'two-hop'}, {each.ranks} ranks"
            lines.append(bars.bits(f"{about}: bits", each.bits))
            if needed := bars.PAYLOAD_TIMES.get((each.ranks, each.algorithm)):
                best = self.best_plain(each.ranks)
                lines.append(bars.at_least(f"{about} over {best.algorithm} in bf16", best.seconds / each.seconds, needed))
        return lines


def measure(rounds: int, ranks: Sequence[int], progress: Callable[[str], None]) -> Payloads:
    """Raises links.RankError and LinksError; ask links.unavailable() first."""
    ways, auto = [], {}
    for world in ranks:
        progress(f"emulated links, {world} ranks: {TOKENS} x {HIDDEN} in bf16, 8 and 4 bits")
        with links(ranks=world, rate_mbit=RATE_MBIT, delay_ms=DELAY_MS) as network:
            found = network.run(in_rank, (rounds,), timeout_s=300)[0]
        ways += [Payload(world, *way) for way in found["ways"]]
        auto[world] = found["auto"]
    return Payloads(ways, auto)


def in_rank(rounds: int) -> dict:
    """{ways: (algorithm, codec, seconds, bits, interface's bits, error), auto}."""
    with join("distributed", codec="auto") as communicator:
        world, values = communicator.world_size, TOKENS * HIDDEN
        auto = communicator.choice.pick("all_reduce", 2 * values, torch.bfloat16, SITE)
        communicator.codecs.calibration = calibration(world)
        summands = [summand(rank) for rank in range(world)]
        exact, own = sum(each.float() for each in summands), summands[communicator.rank]
        spread = exact.square().mean().sqrt()
        ways: dict[Route, tuple[list[float], list[int], list[int], float]] = {}
        for _ in range(rounds + 1):                  # the first is not counted: receives are posted then
            for route in (Route(), *PLAIN, *CODED):
                x = own.clone()
                communicator.choice = Fixed(Route("one_shot"))
                communicator.barrier()
                communicator.choice = Choice() if route == Route() else Fixed(route)
                sent, counted, began = communicator.bytes_sent, interface_bytes(), time.perf_counter()
                if route == Route():
                    dist.all_reduce(x)
                else:
                    communicator.all_reduce(x, site=SITE)
                seconds = time.perf_counter() - began
                error = ((x.float() - exact).square().mean().sqrt() / spread).item()
                kept = ways.setdefault(route, ([], [], [], error))
                for numbers, number in zip(kept, (seconds, communicator.bytes_sent - sent, interface_bytes() - counted)):
                    numbers.append(number)
        communicator.choice = Fixed(Route("one_shot"))
        found = []
        for route, (seconds, sent, counted, error) in ways.items():
            name = "ring" if route == Route() else route.algorithm       # gloo's own all-reduce is a ring
            mine = None if route == Route() else bars.bits_per_value(sent[-1], values, name, world)
            found.append(("gloo" if route == Route() else route.algorithm, route.codec,
                          slowest(communicator, statistics.median(seconds[1:])), mine and slowest(communicator, mine),
                          slowest(communicator, bars.bits_per_value(statistics.median(counted[1:]), values, name, world)), error))
    return {"ways": found, "auto": "/".join(auto)}


def interface_bytes() -> int:
    """What this rank's interface has sent, as the kernel counts: whole packets."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "link0")
    return int(Path(f"/sys/class/net/{name}/statistics/tx_bytes").read_text())


def summand(rank: int) -> torch.Tensor:
    """A rank's partial sums bf16 [TOKENS, HIDDEN]: features of unlike sizes, 1 % of them 20 to 100 times the median, the same on each."""
    return (torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1000 + rank)) * magnitudes()).bfloat16()


def magnitudes() -> torch.Tensor:
    """The features' standard deviations [HIDDEN]."""
    generator = torch.Generator().manual_seed(0)
    found = torch.exp(0.3 * torch.randn(HIDDEN, generator=generator))
    large = torch.randperm(HIDDEN, generator=generator)[: HIDDEN // 100]
    found[large] = found.median() * (20 + 80 * torch.rand(len(large), generator=generator))
    return found


def calibration(world_size: int) -> Calibration:
    """What calibrating on other tokens would give: ranges of three deviations, of the sum √N times that."""
    highest = 3.0 * magnitudes()
    each, total = highest.repeat(world_size, 1), highest * world_size**0.5
    return Calibration(world_size, {SITE: SiteRanges.symmetric(-each, each, -total, total)})
