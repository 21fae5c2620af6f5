"""From a measured link to the table of routes: predict every candidate, put the best ones to the clock, correct, choose.

The model is good to some thirty per cent, and near a crossing that decides wrongly; so the candidates near the top are run for real at some
sizes. A measured time stands for itself; between measured sizes the prediction of an algorithm is scaled by what it was off by there.
Rank 0 decides what is measured and what is chosen, and sends its decisions to the others as JSON.
"""

from __future__ import annotations

import itertools
import json
import math
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from hetero_attn.collectives.algorithms import CODED, OPERATIONS
from hetero_attn.collectives.choice import NARROW, NATIVE, PLAIN, WIDE, BySite, Choice, Fixed, Route, Table, from_json
from hetero_attn.collectives.codec import CALIBRATED as CALIBRATED_CODEC
from hetero_attn.collectives.codec import GROUP_BITS
from hetero_attn.collectives.codec import NAMES as CODECS
from hetero_attn.collectives.cost import CANDIDATES, CodecCost, LinkModel, as_settings, fit, from_settings, predict
from hetero_attn.collectives.distributed import DistributedCommunicator
from hetero_attn.collectives.link import WARM_UP, Point, chosen, measure, measure_codecs, measure_pings, measure_streams, samples_of
from hetero_attn.communicator import Communicator
from hetero_attn.hardware import Link
from hetero_attn.profile import DeviceProfile

SIZES = tuple(1 << exponent for exponent in range(8, 25))              # 256 bytes to 16 MiB, a row of the table each
CODED_OPERATIONS = ("all_reduce", "reduce_scatter")                    # what carries partial sums
CALIBRATED = (("one_shot", 1 << 8), ("two_shot", 1 << 8), ("star", 1 << 8), ("ring", 1 << 8),
              ("one_shot", 1 << 17), ("two_shot", 1 << 17), ("star", 1 << 16))
CLOSE_CALL = 1.6                                     # candidates predicted within this factor of the best are put to the clock
PROMISING = 3                                        # ... but no more than so many


class Effort(NamedTuple):
    """How much is measured: runs of each ping and collective, seconds for one of them, the sizes checked and the seconds for all checks.
    always: collectives that are timed even if the model sees no use in it."""

    repeats: int
    limit_s: float
    checked: tuple[tuple[str, int], ...]
    budget_s: float
    always: tuple[tuple[str, int], ...] = ()


QUICK = Effort(3, 0.1, (("all_reduce", 1 << 13), ("all_reduce", 1 << 15), ("all_reduce", 1 << 16)), 0.8)
THOROUGH = Effort(15, 0.5, tuple(
    (operation, size) for size in (1 << 8, 1 << 11, 1 << 13, 1 << 15, 1 << 16, 1 << 18, 1 << 20, 1 << 22) for operation in OPERATIONS
    if operation != "broadcast"                      # its root runs ahead of the others, which is not the time until all have it
), 30.0, ((NATIVE, 1 << 8), (NATIVE, 1 << 15), (NATIVE, 1 << 20)))


@dataclass(frozen=True)
class Survey:
    """What was found out about a link: the model, and measured collectives of float32."""

    world_size: int
    hosts: tuple[str, ...]
    link: LinkModel
    points: tuple[Point, ...] = ()
    codecs: Mapping[str, CodecCost] = field(default_factory=dict)

    def predicted(self, operation: str, route: Route, nbytes: int, kind: str = WIDE) -> float:
        """Seconds by the model alone. kind: WIDE or NARROW."""
        widening = 2.0 if kind == NARROW and operation in CODED_OPERATIONS else 1.0
        codec = self.codecs.get(route.codec)
        if codec is not None and kind == NARROW:     # its numbers are for float32: there are two 16-bit values in as many bytes
            codec = CodecCost(2 * codec.ratio, 2 * codec.byte_s, codec.call_s)
        return predict(self.link, operation, route, self.world_size, nbytes, widening=widening, codec=codec)

    def measured(self, operation: str, route: Route, nbytes: int) -> float | None:
        """Seconds of float32 on the clock, None where it was not run."""
        return next((p.seconds for p in self.points if (p.operation, p.nbytes, p.route) == (operation, nbytes, route)), None)

    def correction(self, operation: str, route: Route, nbytes: int) -> float:
        """What the model's prediction is to be multiplied by: measured over predicted, between two measured sizes by their ratio."""
        known = sorted(
            (math.log2(p.nbytes), math.log(p.seconds / self.predicted(operation, route, p.nbytes)))
            for p in self.points if (p.operation, p.route) == (operation, route)
        )
        if not known:                                # never timed: as far off as the worst that was, so that chance does not choose it
            timed = {p.route for p in self.points if p.operation == operation}
            return max([1.0, *(self.correction(operation, each, nbytes) for each in timed)])
        at = min(max(math.log2(nbytes), known[0][0]), known[-1][0])
        for (left, low), (right, high) in itertools.pairwise(known):
            if left <= at <= right:
                return math.exp(low + (high - low) * (at - left) / (right - left))
        return math.exp(known[0][1])

    def expected(self, operation: str, route: Route, nbytes: int, kind: str = WIDE) -> float:
        """The best that is known, seconds: measured where it was, else predicted and corrected."""
        seconds = self.measured(operation, route, nbytes) if kind == WIDE else None
        return seconds or self.predicted(operation, route, nbytes, kind) * self.correction(operation, route, nbytes)

    def candidates(self, operation: str, kind: str = WIDE, *, algorithm: str = "auto", codec: str = PLAIN) -> list[Route]:
        """The routes to choose from. torch.distributed's own collectives are among them where one was measured: the model knows them
        least. algorithm, codec: as a profile allows them."""
        allowed = [each for each in CANDIDATES[operation] if algorithm in ("auto", each)] or [algorithm]
        clocked = kind == WIDE and any((p.operation, p.route.algorithm) == (operation, NATIVE) for p in self.points)
        plain = [Route(each) for each in allowed if each != NATIVE or clocked or allowed == [NATIVE]]
        if codec == PLAIN or operation not in CODED_OPERATIONS:
            return plain
        coded = [Route(each, name) for name in self.codecs for each in allowed if each in CODED and codec in ("auto", name)]
        return plain + coded if codec == "auto" else coded or plain

    def best(self, operation: str, nbytes: int, kind: str = WIDE, **allowed: str) -> Route:
        """The route with the least expected time; of equals the earlier candidate."""
        return min(self.candidates(operation, kind, **allowed), key=lambda route: self.expected(operation, route, nbytes, kind))

    def table(self, **allowed: str) -> Table:
        """The choice for every operation, kind of dtype and size."""
        return Table({
            (operation, kind): {size: self.best(operation, size, kind, **allowed) for size in SIZES}
            for operation in OPERATIONS for kind in (WIDE, NARROW)
        })

    def settings(self) -> dict[str, Any]:
        """This survey as values of the profile's section `link`, as the overlay holds them."""
        measured = [f"{p.operation} {p.nbytes} {p.route.algorithm} {p.route.codec} {p.seconds * 1e3:.4g}" for p in self.points]
        hosts = [f"{rank} {host}" for rank, host in enumerate(self.hosts)]
        return {f"link.{name}": value for name, value in (as_settings(self.link) | {"hosts": hosts, "measured": measured}).items()}


def from_profile(link: Link, world_size: int) -> Survey | None:
    """The survey that a profile's section `link` holds, None where it holds none or one of other ranks. Raises ValueError if damaged."""
    if link.latency_ms is None or len(link.hosts) != world_size:
        return None
    points = {}
    for text in link.measured:
        operation, nbytes, algorithm, codec, milliseconds = text.split()
        route, seconds = Route(algorithm, codec), float(milliseconds) * 1e-3
        known = algorithm in CANDIDATES.get(operation, ()) and codec in (PLAIN, *CODECS)
        if not (known and int(nbytes) > 0 and 0 < seconds < math.inf):
            raise ValueError(f"link.measured holds {text!r}")
        points[operation, int(nbytes), route] = Point(operation, int(nbytes), route, seconds)
    model = from_settings(link.latency_ms, link.message_ms or 0.0, link.crowd_ms or 0.0, link.bandwidth_mbps, link.root_mbps)
    return Survey(world_size, tuple(entry.partition(" ")[2] for entry in link.hosts), model, tuple(points.values()))


def survey(communicator: DistributedCommunicator, hosts: Sequence[str], effort: Effort = QUICK) -> Survey:
    """Measure the link between all ranks, which call this together. hosts: the host of each rank. The result counts on rank 0."""
    with chosen(communicator, Route("one_shot")):    # what is asked in between takes one hop, not the many of torch.distributed
        return _survey(communicator, hosts, effort)


def _survey(communicator: DistributedCommunicator, hosts: Sequence[str], effort: Effort) -> Survey:
    world = communicator.world_size
    pings = measure_pings(communicator, effort.repeats)
    streams = measure_streams(communicator)
    timed = partial(measure, communicator, repeats=effort.repeats, limit_s=effort.limit_s)
    points = better_of_two(timed, [("all_reduce", nbytes, algorithm, PLAIN) for algorithm, nbytes in CALIBRATED])
    model = fit(samples_of(world, pings, streams, points))
    points += [timed("all_reduce", nbytes, Route(algorithm)) for algorithm, nbytes in effort.always]
    found = Survey(world, tuple(hosts), model, tuple(points))
    left_s = effort.budget_s
    for nearest in (PROMISING, 1, 1):                # first the candidates near the top, then what looks best after correction
        began = time.perf_counter()
        jobs = share_json(communicator, jobs_of(found, effort, nearest, left_s))
        points += better_of_two(timed, jobs)
        found = replace(found, points=tuple(points))
        left_s -= time.perf_counter() - began
        if not jobs:
            break
    return found


def better_of_two(timed: Callable[..., Point], jobs: Sequence[tuple[str, int, str, str]]) -> list[Point]:
    """Each job timed twice at some distance, and the better one counts: what disturbs a machine lasts longer than a few calls."""
    tries = [timed(operation, nbytes, Route(*route)) for _ in range(2) for operation, nbytes, *route in jobs]
    return [min(pair, key=lambda point: point.seconds) for pair in zip(tries, tries[len(jobs):])]


def jobs_of(found: Survey, effort: Effort, nearest: int, left_s: float) -> list[tuple[str, int, str, str]]:
    """What to put to the clock: at the sizes checked, up to `nearest` candidates close to the best, as many as fit into left_s seconds.

    (operation, bytes, algorithm, codec) each.
    """
    jobs = []
    for operation, nbytes in effort.checked:
        routes = sorted(map(Route, CANDIDATES[operation]), key=lambda route: found.expected(operation, route, nbytes))
        least = found.expected(operation, routes[0], nbytes)
        for route in routes[:nearest]:
            seconds = found.expected(operation, route, nbytes)
            cost_s = 2 * (min(effort.repeats, max(1, effort.limit_s / seconds)) + WARM_UP) * seconds
            if found.measured(operation, route, nbytes) is None and seconds <= CLOSE_CALL * least and cost_s <= left_s:
                left_s -= cost_s
                jobs.append((operation, nbytes, *route))
    return jobs


def settle(
    communicator: DistributedCommunicator, profile: DeviceProfile, hosts: Sequence[str], *, worth_measuring: bool
) -> tuple[Choice, str]:
    """The choice that rank 0's profile asks for, and in words where it comes from; all ranks call this together, and get the same.

    A named algorithm is taken as it is. 'auto' takes the overlay's measurements where they are of these hosts; else it measures for about
    a second where that is worth it (not on one host, and not where a device library carries the tensors).
    """
    allowed, trouble, known, plan = {"algorithm": profile.algorithm, "codec": profile.codec}, "", None, "leave"
    if communicator.rank == 0:                       # its profile counts; what is wrong with it is everybody's error, or they would wait
        try:
            known = from_profile(profile.link, communicator.world_size)
        except ValueError as error:
            trouble = f"the overlay's link measurements are damaged ({error}); run hetero-attn tune --tp {communicator.world_size} again"
        if known is not None and list(known.hosts) != list(hosts):
            known = None
        plan = "name" if profile.algorithm != "auto" else "overlay" if known is not None else "measure" if worth_measuring else "leave"
    plan, allowed, trouble = share_json(communicator, (plan, allowed, trouble))
    if trouble:
        raise ValueError(f"rank {communicator.rank} of {communicator.world_size}: {trouble}")
    algorithm, codec = allowed["algorithm"], allowed["codec"]
    if plan == "name":
        return Fixed(Route(algorithm, PLAIN if codec == "auto" else codec)), "the profile names it"
    if plan == "leave" and codec in (PLAIN, "auto"):
        return Choice(), "not measured: one host, or a device library"
    if plan == "leave":                              # a codec that is asked for is used, also where nothing is gained by it
        return Fixed(Route("two_shot", codec)), "not measured, and the profile names a codec"
    began = time.perf_counter()
    found = survey(communicator, hosts) if plan == "measure" else known
    codecs = measure_codecs(communicator, codecs_of(codec))
    if found is not None:
        found = replace(found, codecs=codecs)
    table = found.table(**allowed).to_json() if communicator.rank == 0 else ""
    if codec == "auto":                              # which codecs there are is known when the model has brought its calibration
        communicator.codecs.on_calibration = partial(_choose_anew, communicator, found)
    source = f"measured at start-up in {time.perf_counter() - began:.1f} s" if plan == "measure" else "measured by `hetero-attn tune`"
    return from_json(share_json(communicator, table)), source


def codecs_of(codec: str, *, calibrated: bool = False) -> tuple[str, ...]:
    """The codecs that a profile's `codec` lets a sum choose from; calibrated: at a site that a calibration covers."""
    if codec == "auto":
        return (CALIBRATED_CODEC,) if calibrated else tuple(GROUP_BITS)
    return () if codec == PLAIN else (codec,)


def _choose_anew(communicator: DistributedCommunicator, found: Survey | None) -> None:
    """Under `codec: auto`, with a calibration: its sites choose between int4_outliers and no codec, other calls as before. `found` counts
    on rank 0; all ranks call this together."""
    calibration = communicator.codecs.calibration
    cost = measure_codecs(communicator, codecs_of("auto", calibrated=True), calibration)
    choice = ""
    if communicator.rank == 0:
        inside = replace(found, codecs=cost).table(codec="auto")
        choice = BySite(calibration.sites, inside, found.table(codec="auto")).to_json()
    communicator.choice = from_json(share_json(communicator, choice))


def share_json(communicator: Communicator, value: Any) -> Any:
    """Rank 0's value on every rank, as JSON in bytes: nothing is unpickled from the wire. What the others pass is ignored."""
    payload = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    length = communicator.broadcast(torch.tensor([payload.numel()]), site="tune")
    if communicator.rank:
        payload = torch.empty(int(length), dtype=torch.uint8)
    return json.loads(bytes(communicator.broadcast(payload, site="tune").tolist()))


def gather_hosts(communicator: Communicator) -> list[str]:
    """The host name of every rank, on every rank."""
    own = torch.tensor(list(socket.gethostname().encode()), dtype=torch.uint8)
    lengths = communicator.all_gather(torch.tensor([own.numel()]), sizes=[1] * communicator.world_size).tolist()
    return [bytes(each.tolist()).decode() for each in communicator.all_gather(own, sizes=lengths).split(lengths)]
