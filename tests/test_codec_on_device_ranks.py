"""Sums under a codec between real ranks whose tensors count as a device's: every bit as when the host packs, and only packed bytes cross.

The collectives' conformance cases run three ways on the same ranks: packed by the host, packed "on the device" by kernels that the registry
finds (native ones with copies on a thread; the same on a device that is as late as it may be; Triton's in its interpreter), and with
payloads that stay there, as over a device library. Ranks may differ in the way, so rank 0 of each group is the host's in one more run.
"""

import gc
import math
import threading
import time
import weakref
from unittest import mock

import pytest
import torch
from codec_cases import TORCH
from late_device import CPU, LatePath

from hetero_attn import in_flight
from hetero_attn.collectives import codec
from hetero_attn.collectives.choice import Fixed, Route
from hetero_attn.collectives.codec import CODED_DTYPES, NAMES, DevicePath, device_kernels
from hetero_attn.collectives.codec.features import FeatureTable
from hetero_attn.collectives.codec.on_device import ALIGN, HEADER
from hetero_attn.communicator import CommunicatorError
from hetero_attn.testing.collective_cases import CASES, FULL
from hetero_attn.testing.collectives import call, digest
from hetero_attn.testing.ranks import on_ranks

pytestmark = pytest.mark.timeout(900 if FULL else 280)
SUMS = ("all_reduce", "reduce_scatter", "linear_all_reduce", "all_reduce_rms_norm")
# What is coded, and of each dtype that is not, and of each shape without values, a few.
CODED = [case for place, case in enumerate(CASES) if case.operation in SUMS
         and ((case.dtype in CODED_DTYPES and math.prod(case.shape)) or place % 11 == 0)]
ROUTES = [Route(algorithm, name) for algorithm in ("one_shot", "two_shot", "star") for name in NAMES]
SITE = "layers.0.o_proj"


class AnyWidth:
    """A calibration of every site and width: made up, alike on all ranks."""

    def tables(self, site, width, world_size):
        generator = torch.Generator().manual_seed(width)
        scales, means = (torch.rand(world_size + 1, max(width, 1), generator=generator) for _ in range(2))
        outliers = torch.arange(0, width, 7, dtype=torch.int32)
        made = [FeatureTable(scale / 3, mean - 0.5, outliers) for scale, mean in zip(scales, means)]
        return made[:world_size], made[world_size]


def found_path(communicator) -> DevicePath:
    """As it comes about for a device: the registry's first backend with kernels for these tensors."""
    codecs = communicator.codecs
    codecs.paths.pop(CPU, None)
    return codecs.path(CPU, "int4_group32", torch.float32) or DevicePath(TORCH, "torch", CPU, codecs.traffic)    # without a compiler


def is_coded(case, world_size: int) -> bool:
    enough = case.operation in ("all_reduce", "linear_all_reduce") or case.shape[0] >= world_size
    return enough and case.dtype in CODED_DTYPES and math.prod(case.shape) > 0


def results(communicator, case, started) -> list[str] | str:
    """Digests of a case's results, or what it raised."""
    try:
        return [digest(result) for result in call(communicator, case, started=started)[0]]
    except ValueError as error:
        return f"{type(error).__name__}: {error}"


def conform(communicator, kind: str, most: int, every: int) -> dict:
    """The cases on this rank: what differed, how many ran, what crossed. kind: 'thread', 'late' or the name of a backend."""
    codecs, device = communicator.codecs, LatePath(TORCH, communicator.codecs.traffic) if kind == "late" else found_path(communicator)
    native, exchange, report = codec.kernels, communicator._exchange, {"wrong": [], "calls": 0, "name": device.name}
    codecs.calibration = AnyWidth()
    resident = DevicePath(TORCH, "torch", CPU, codecs.traffic) if kind == "late" else device       # its kernels' words are read at once
    cases = [case for case in CODED if math.prod(case.shape) <= most][::every]
    for number, case in enumerate(cases):
        for route in ROUTES if FULL else [ROUTES[(number + communicator.world_size) % len(ROUTES)]]:
            communicator.choice = Fixed(route)
            codecs.paths[CPU], codec.kernels = None, lambda device: TORCH
            want, crossed = results(communicator, case, False), codecs.traffic.bytes_down
            codec.kernels = native
            ways = {"device": (device, False), "device, started": (device, True)}
            if communicator.rank == 0:
                ways["host among devices"] = None, False
            else:
                ways["device beside a host"] = device, False
            for way, (path, started) in ways.items():
                codecs.paths[CPU] = path
                if (found := results(communicator, case, started)) != want:
                    report["wrong"].append(f"{case.name} {route} {way}: {found}, expected {want}")
            # A device library has no root: star would be two_shot there. What no codec serves, it sums in an order of its own.
            if route.algorithm != "star" and is_coded(case, communicator.world_size):
                codecs.paths[CPU] = resident if communicator.rank else None
                with mock.patch.object(exchange, "is_native", lambda x: x.is_floating_point() and x.dtype != torch.float64):
                    if (found := results(communicator, case, False)) != want:
                        report["wrong"].append(f"{case.name} {route} resident: {found}, expected {want}")
            report["calls"] += 1
            report["coded"] = report.get("coded", 0) + (codecs.traffic.bytes_down > crossed)
    report["traffic"] = codecs.traffic.bytes_down, codecs.traffic.bytes_up
    return report


def check(outcomes, least: int) -> list[dict]:
    assert not any(outcome.error for outcome in outcomes), next(outcome.traceback for outcome in outcomes if outcome.error)
    reports = [outcome.result for outcome in outcomes]
    for report in reports:
        assert not report["wrong"], report["wrong"][:3]
        assert report["calls"] >= least and 3 * report["coded"] > report["calls"] and min(report["traffic"]) > 0, report
    return reports


@pytest.mark.ranks
@pytest.mark.parametrize(("world_size", "kind"), [(2, "thread"), (4, "thread")])
def test_conformance_cases_have_the_hosts_bits(world_size, kind):
    check(on_ranks(conform, (kind, 1 << 30, 1 if FULL else world_size), world_size, timeout_s=800), 30)


@pytest.fixture(scope="module")
def three():
    """Reports of three ranks on a late device, and what crossed there."""
    outcomes = on_ranks(conform_and_cross, (), 3, timeout_s=800)
    assert not any(outcome.error for outcome in outcomes), next(outcome.traceback for outcome in outcomes if outcome.error)
    return outcomes


def conform_and_cross(communicator) -> dict:
    return conform(communicator, "late", 1 << 30, 1 if FULL else 3) | {"crossings": crossings(communicator)}


@pytest.mark.ranks
def test_conformance_cases_have_the_hosts_bits_on_a_late_device(three):
    check(three, 30)


@pytest.mark.ranks
@pytest.mark.skipif(not FULL, reason="the other worlds in the full grid")
@pytest.mark.parametrize(("world_size", "kind"), [(3, "thread"), (2, "late"), (4, "late")])
def test_conformance_cases_have_the_hosts_bits_in_other_worlds(world_size, kind):
    check(on_ranks(conform, (kind, 1 << 30, 1), world_size, timeout_s=800), 60)


def interpreted(communicator) -> dict:
    from triton_emulated import NAME, triton_emulated

    with triton_emulated() as launcher:
        assert device_kernels("cpu").name == NAME
        return conform(communicator, NAME, 300, 1 if FULL else 7) | {"launched": sorted({name for name, *_ in launcher.launches})}


@pytest.mark.ranks
def test_triton_kernels_serve_in_the_interpreter(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")
    for name, value in {"TRITON_INTERPRET": "1", "HETERO_ATTN_SET": "backends=[triton-emulated,sdpa]", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    reports = check(on_ranks(interpreted, (), 2, timeout_s=800), 10)
    assert {report["name"] for report in reports} == {"triton-emulated"}
    assert all(set(report["launched"]) & {"unpack_groups", "unpack_features"} for report in reports)


# ---- what crosses, and what goes wrong -----------------------------------------------------------------------------------------------


def crossings(communicator) -> dict:
    """Bytes down and up of one sum, by route; and what a ring says to a codec."""
    codecs, found = communicator.codecs, {}
    codecs.calibration = AnyWidth()
    codecs.paths[CPU] = DevicePath(TORCH, "torch", CPU, codecs.traffic)
    for route in ROUTES:
        communicator.choice = Fixed(route)
        codecs.traffic.clear()
        communicator.all_reduce(torch.ones(64, 130, dtype=torch.bfloat16), site=SITE)
        found[route] = codecs.traffic.bytes_down, codecs.traffic.bytes_up, codecs.traffic.total().nbytes
    communicator.choice = Fixed(Route("ring", "int4_group32"))
    x = torch.ones(8)
    try:
        communicator.all_reduce(x, site=SITE)
    except ValueError as error:
        found["ring"] = str(error)
    codecs.traffic.clear()
    communicator.choice = Fixed(Route("ring"))
    communicator.all_reduce(x, site=SITE)
    found["plain"] = codecs.traffic.bytes_down, x.sum().item()
    return found


@pytest.mark.ranks
def test_a_call_brings_down_what_it_packs_and_up_what_it_hears(three):
    world, values = 3, 64 * 130
    up = lambda payloads: sum(-(-(each - 1) // ALIGN) * ALIGN for each in payloads)
    for rank, found in enumerate(outcome.result["crossings"] for outcome in three):
        for route in ROUTES:
            down, came, packed = found[route]
            payloads = {"one_shot": 1, "two_shot": world + 1, "star": 1 + (rank == 0)}[route.algorithm]
            assert down == packed + payloads * HEADER, route
            each = packed // (2 if route.algorithm == "star" and rank == 0 else 1)
            if route.algorithm == "one_shot":
                assert came == up([packed] * (world - 1))
            elif route.algorithm == "star":
                assert came == up([each] * (world - 1) if rank == 0 else [each])
            else:
                assert packed // 2 < came <= packed + 2 * world * ALIGN
            bits = {"int4_outliers": 4 + 19 * 12 / 130 + 16 / 130, "int4_group32": 4.5, "int8_group32": 8.5}[route.codec]
            share = {"one_shot": 1, "two_shot": 1 + 1 / world, "star": 1 + (rank == 0)}[route.algorithm]
            assert 8 * down <= 1.02 * bits * values * share + 8 * 16 * payloads, route
        assert "algorithm 'ring' would encode partial sums anew" in found["ring"] and found["plain"] == (0, 24)


class Failing(type(TORCH)):
    """Kernels of a device that stops: the call number `after` of the named function fails."""

    def __init__(self, name, after):
        self.name, self.left = name, after

    def _count(self, name):
        if name == self.name:
            self.left -= 1
            if self.left < 0:
                raise MemoryError("the device has no registers left")

    def pack_groups(self, *arguments):
        self._count("pack")
        return super().pack_groups(*arguments)

    def unpack_groups(self, *arguments):
        self._count("unpack")
        return super().unpack_groups(*arguments)


class Watched(DevicePath):
    """Knows what it has handed out."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.handed = []

    def objection(self, codec, dtype):
        return None

    def host_memory(self, nbytes):
        made = super().host_memory(nbytes)
        self.handed.append(weakref.ref(made.untyped_storage()))
        return made


def failing(communicator, algorithm: str, name: str, after: int) -> dict:
    communicator.choice = Fixed(Route(algorithm, "int4_group32"))
    kernels = Failing(name, after) if communicator.rank == 1 else TORCH
    path = communicator.codecs.paths[CPU] = Watched(kernels, "mychip", CPU, communicator.codecs.traffic)
    x, report = torch.ones(300, 130), {}
    try:
        communicator.start_all_reduce(x, site=SITE).wait()
        report["said"] = "nothing"
    except CommunicatorError as error:
        report["said"], report["missing"] = str(error), error.missing
        del error
    try:
        communicator.all_reduce(x, site=SITE)
        report["again"] = "nothing"
    except CommunicatorError as error:
        report["again"] = str(error)
    communicator.close()
    handed = path.handed
    communicator.codecs.paths.clear()
    communicator.failure.__traceback__ = None
    for error in (communicator.failure, communicator.failure.__cause__, communicator.failure.__context__):
        if error is not None:
            error.__traceback__ = error.__cause__ = error.__context__ = None
    del path
    deadline = time.monotonic() + 5
    alive = lambda: [each.name for each in threading.enumerate() if each.name.startswith("hetero-attn-copies")]
    while (gc.collect() or True) and time.monotonic() < deadline and (alive() or any(each() is not None for each in handed)):
        time.sleep(0.05)
    report["left"] = alive(), len(handed), sum(each() is not None for each in handed), in_flight._calls
    return report


@pytest.mark.ranks
@pytest.mark.parametrize(("algorithm", "name", "after"), [
    ("two_shot", "pack", 2), *([("one_shot", "pack", 0), ("two_shot", "unpack", 1), ("star", "unpack", 0)] if FULL else []),
])
def test_a_device_that_fails_in_the_middle_names_itself_and_leaves_nothing(algorithm, name, after):
    outcomes = on_ranks(failing, (algorithm, name, after), 2, collective_timeout_s=3)
    assert not any(outcome.error for outcome in outcomes), next(outcome.traceback for outcome in outcomes if outcome.error)
    other, own = (outcome.result for outcome in outcomes)
    assert (f"{name}ing the sum at {SITE} on cpu by backend mychip failed (MemoryError: the device has no registers left); without mychip "
            "in the profile's backends the host packs") in own["said"] and own["said"] == own["again"]
    assert "rank 1 of 2: all_reduce of x [300, 130] float32 at layers.0.o_proj failed" in own["said"]
    assert "rank 0 of 2: all_reduce of x [300, 130]" in other["said"] and "rank 1" in other["said"]
    for report in (other, own):
        threads, handed, left, running = report["left"]
        assert (handed or after == 0) and not threads and not running, report
        assert report is other or not left, report
