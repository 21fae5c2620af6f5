"""Measuring the link between the actual ranks: pings, streams and short runs of the algorithms, for the cost model to be fitted to.

Primitive measurements alone flatter a link: what a message costs shows only while many are under way. So the samples are of both kinds.
Every rank measures, the slowest counts, and nothing here takes long: streams grow only until the clock can tell their rate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import NamedTuple

import torch

from hetero_attn.collectives.choice import Fixed, Route
from hetero_attn.collectives.codec import CALIBRATED, CPU, Calibration, Codecs
from hetero_attn.collectives.coding import Coding
from hetero_attn.collectives.cost import CANDIDATES, CodecCost, Load, load
from hetero_attn.collectives.direct import Steps
from hetero_attn.collectives.distributed import DistributedCommunicator
from hetero_attn.collectives.wire import AHEAD_BYTES, Pending, Wire
from hetero_attn.communicator import Communicator

PING_BYTES = 64
STREAM_BYTES = (1 << 16, 1 << 18, 1 << 20, 1 << 22)
LONG_ENOUGH_S = 0.02                                 # a stream that takes this long tells its rate
CODEC_VALUES = 1 << 16
WARM_UP = 1                                          # calls before the clock: receives are then posted ahead


class Point(NamedTuple):
    """A measured collective of float32: the slowest rank's median."""

    operation: str
    nbytes: int
    route: Route
    seconds: float


def slowest(communicator: Communicator, seconds: float, *, site: str = "") -> float:
    """The longest of all ranks' times, the same number on each."""
    own = torch.tensor([seconds], dtype=torch.float64)
    return communicator.all_gather(own, sizes=[1] * communicator.world_size, site=site).max().item()


def ping(wire: Wire, one: int | None, other: int | None) -> Steps:
    """A message from `one` to `other` and back; nothing on other ranks. Returns the seconds at `one`."""
    payload, began = torch.zeros(PING_BYTES, dtype=torch.uint8), time.perf_counter()
    if wire.rank not in (one, other):
        return 0.0
    peer = other if wire.rank == one else one
    arrival = wire.expect(peer, PING_BYTES)
    wire.replenish()
    works = []
    if wire.rank == one:
        works.append(wire.send(payload, peer))
    yield Pending([arrival.work, *works])
    arrival.release()
    if wire.rank == other:
        yield Pending([wire.send(payload, peer)])
    return time.perf_counter() - began if wire.rank == one else 0.0


def stream(wire: Wire, nbytes: int) -> Steps:
    """nbytes from every rank to the next, all at once. Returns the seconds until this rank's has come."""
    arrival = wire.expect((wire.rank - 1) % wire.world_size, nbytes)
    began = time.perf_counter()
    work = wire.send(torch.zeros(nbytes, dtype=torch.uint8), (wire.rank + 1) % wire.world_size)
    wire.replenish()
    yield Pending([arrival.work, work])
    arrival.release()
    return time.perf_counter() - began


def measure_pings(communicator: DistributedCommunicator, repeats: int) -> list[float]:
    """The round trip from each rank to the next, seconds: the median of `repeats`. Pairs that share no rank go at the same time."""
    world = communicator.world_size
    times = [0.0] * world
    rounds = [[rank for rank in range(world) if rank % 2 == odd and rank != world - 1] for odd in (0, 1)]
    for starters in [*rounds, [world - 1]] if world > 2 else [[0]]:
        mine = next((rank for rank in starters if communicator.rank in (rank, (rank + 1) % world)), None)
        steps = partial(ping, one=mine, other=None if mine is None else (mine + 1) % world)
        tries = [communicator.run_steps("ping", steps) for _ in range(repeats + 1)]
        if mine == communicator.rank:
            times[mine] = median(tries[1:])
    return communicator.all_gather(torch.tensor([times], dtype=torch.float64), sizes=[1] * world).amax(0).tolist()


def measure_streams(communicator: DistributedCommunicator) -> list[tuple[int, float]]:
    """(bytes, seconds) of streams from every rank to the next, longer ones until they take LONG_ENOUGH_S."""
    found = []
    for nbytes in STREAM_BYTES:
        tries = [slowest(communicator, communicator.run_steps("stream", lambda wire, n=nbytes: stream(wire, n))) for _ in range(3)]
        found.append((nbytes, median(tries)))
        if found[-1][1] > LONG_ENOUGH_S:
            break
    return found


def measure(communicator: DistributedCommunicator, operation: str, nbytes: int, route: Route, *, repeats: int, limit_s: float) -> Point:
    """Time an operation on float32 by a route: calls one after the other, until `repeats` are done or limit_s is used up.

    All ranks call this together. The communicator's choice is as before afterwards.
    """
    count, world = max(1, nbytes // 4), communicator.world_size
    if operation == "all_gather":
        count = max(1, count // world)
    x = torch.zeros(count)
    call: Callable[[], object] = {
        "all_reduce": lambda: communicator.all_reduce(x, site="tune"),
        "reduce_scatter": lambda: communicator.reduce_scatter(x, site="tune"),
        "all_gather": lambda: communicator.all_gather(x, sizes=[count] * world, site="tune"),
        "broadcast": lambda: communicator.broadcast(x, site="tune"),
    }[operation]
    began = time.perf_counter()
    with chosen(communicator, route):
        for _ in range(WARM_UP):
            call()
    each = slowest(communicator, (time.perf_counter() - began) / WARM_UP)
    tries = []
    with chosen(communicator, route):
        for _ in range(max(1, min(repeats, int(limit_s / max(each, 1e-6)) - WARM_UP))):
            began = time.perf_counter()
            call()
            tries.append(time.perf_counter() - began)
    return Point(operation, nbytes, route, slowest(communicator, median(tries)))


@contextmanager
def chosen(communicator: DistributedCommunicator, route: Route) -> Iterator[None]:
    """Everything by one route in this block, which all ranks enter together."""
    kept, communicator.choice = communicator.choice, Fixed(route)
    try:
        yield
    finally:
        communicator.choice = kept


def codec_costs(
    rank: int, world_size: int, names: Sequence[str], calibration: Calibration | None = None, device: torch.device = CPU
) -> dict[str, CodecCost]:
    """Bytes on the wire and seconds, for a byte of fp32 and for any call, by this rank's own kernels for tensors on the device.

    The codec that needs a calibration is timed with its first site's tables; without one, which comes with a model only, it is counted as
    the codec of as many bits that needs none.
    """
    codecs, found = Codecs(rank, world_size), {}
    codecs.calibration = calibration
    for name in names:
        site, width = "tune", CODEC_VALUES
        if name == CALIBRATED and calibration is not None:
            site = next(iter(calibration.sites))
            width = calibration.sites[site].sum_scale.numel()
        coding = codecs.coding("int4_group32" if name == CALIBRATED and calibration is None else name, site, width, torch.float32, device)
        short, long = (torch.linspace(-1.0, 1.0, count).to(device) for count in (64, max(1, CODEC_VALUES // width) * width))
        call_s, whole_s = (_coding_seconds(coding, values, rank) for values in (short, long))
        ratio = coding.size(0, long.numel()) / long.nbytes
        found[name] = CodecCost(ratio, max(whole_s - call_s, 0.0) / long.nbytes, call_s)
    return found


def _coding_seconds(coding: Coding, values: torch.Tensor, rank: int) -> float:
    """Of an encoding or a decoding of these values, one with the other; where a device's are packed on the host, of their way there too."""
    times = []
    for _ in range(7):
        began = time.perf_counter()
        payload = coding.encode(values if coding.on_device else values.cpu(), 0)
        payload = payload.clone() if coding.on_device else payload             # as another rank's: its own stays on the device
        coding.decode(payload, rank, 0, values.numel()).to(values.device)[-1:].cpu()           # waits for the device
        times.append(time.perf_counter() - began)
    return min(times) / 2


def measure_codecs(
    communicator: DistributedCommunicator, names: Sequence[str], calibration: Calibration | None = None
) -> dict[str, CodecCost]:
    """codec_costs() of the slowest rank; all ranks call it together."""
    own = codec_costs(communicator.rank, communicator.world_size, names, calibration, communicator.device)
    return {name: CodecCost(cost.ratio, *(slowest(communicator, each) for each in cost[1:])) for name, cost in own.items()}


def samples_of(world_size: int, pings: list[float], streams: list[tuple[int, float]], points: list[Point]) -> list[tuple[Load, float]]:
    """What was measured as loads and seconds, for cost.fit(); of the pings the slowest."""
    found = [(Load(hops=2, messages=4, crowd=2 * world_size), max(pings))]
    found += [
        (Load(hops=1 + (nbytes > AHEAD_BYTES), nbytes=nbytes, messages=2, crowd=2 * world_size), seconds) for nbytes, seconds in streams
    ]
    return found + [
        (load(point.operation, point.route.algorithm, world_size, point.nbytes), point.seconds)
        for point in points if point.route.algorithm in CANDIDATES[point.operation]
    ]
