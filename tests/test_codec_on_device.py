"""Codecs on a device: the code that devices run, on CPU tensors, by kernels that a backend has for them and by lanes that are late.

Host memory and device memory are one here, so what is held is the way: which bytes cross and how many, that nothing is read before it has
been waited for, and that no bit differs from what the host's packing gives. test_codec_on_device_ranks.py has the ranks.
"""

import math
import re

import pytest
import torch
from codec_cases import TORCH, values_of
from late_device import CPU, LatePath

from hetero_attn.collectives import codec
from hetero_attn.collectives.codec import NAMES, Codecs, DevicePath, NonFiniteError, Traffic
from hetero_attn.collectives.codec.features import FeatureTable
from hetero_attn.collectives.codec.lossy import GroupCoding, OutlierCoding
from hetero_attn.collectives.codec.on_device import ALIGN, HEADER, Landing, StagedCoding
from hetero_attn.collectives.codec.proof import disagreement
from hetero_attn.collectives.codec.resident import ResidentCoding, ThroughHost
from hetero_attn.collectives.coding import SUM

COUNT, WORLD, FIRST = 1000, 3, 41


def lossy(name, rank, kernels, traffic=None):
    call = ("layers.0.o_proj", rank, torch.float32, kernels, traffic or Traffic())
    if name == "int4_outliers":
        generator = torch.Generator().manual_seed(5)
        scales, means = torch.rand(WORLD + 1, 130, generator=generator), torch.randn(WORLD + 1, 130, generator=generator)
        tables = [FeatureTable(scale, mean, torch.tensor([17, 90])) for scale, mean in zip(scales, means)]
        return OutlierCoding(tables[:WORLD], tables[WORLD], *call)
    return GroupCoding(8 if name.startswith("int8") else 4, *call)


def summands(first=FIRST):
    return [(values_of(COUNT, torch.float32, rank, 0), first) for rank in range(WORLD)]


def wanted(name):
    """The host's payloads, and their sum as rank 0 takes it."""
    payloads = [lossy(name, rank, TORCH).encode(values, first) for rank, (values, first) in enumerate(summands())]
    return payloads, lossy(name, 0, TORCH).total(payloads, FIRST, COUNT, torch.float32)


def late_sum(name, make=LatePath, **options):
    """The same on a late device: rank 0's payload as it is sent, and its sum, of messages whose memory is used again at once."""
    others = [lossy(name, rank, TORCH).encode(values, first) for rank, (values, first) in enumerate(summands())]
    path = make(TORCH, Traffic(), at_once=False, **options)
    coding = StagedCoding(lossy(name, 0, path.kernels), path)
    sent = coding.encode(*summands()[0])
    kept, received = sent.clone(), [payload.clone() for payload in others[1:]]
    total = coding.total([sent, *received], FIRST, COUNT, torch.float32)
    for payload in received:
        payload[:-1] = 0x3C                          # the wire takes another message there: Arrival.release()
    path.main.drain()
    coding.finish()
    return kept, total


def same(found, expected):
    return torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_a_late_device_gives_the_hosts_bytes_and_sums(name):
    payloads, total = wanted(name)
    sent, found = late_sum(name)
    assert same(sent, payloads[0]) and same(found, total)


class SendsUnwaited(LatePath):
    def land(self, body, told):
        landing = super().land(body, told)
        landing._started = type("Unwaited", (), {"synchronize": lambda self: None})()
        return landing


class UnpacksUnwaited(LatePath):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        start = self._up.start
        self._up.start = lambda work: (start(work), type("Unwaited", (), {"wait": lambda self: None})())[1]


class CopiesFromTheWiresMemory(LatePath):
    """Without host memory of its own in between."""

    def lift(self, bodies):
        found = [self.device_memory(body.numel()) for body in bodies]
        self._up.start(lambda: [target.copy_(body) for target, body in zip(found, bodies)]).wait()
        return found


class CopiesBeforePacking(LatePath):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options, keeps_order=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "fault", [SendsUnwaited, UnpacksUnwaited, CopiesFromTheWiresMemory, CopiesBeforePacking], ids=lambda each: each.__name__,
)
def test_a_missing_wait_is_caught(name, fault):
    payloads, total = wanted(name)
    try:
        sent, found = late_sum(name, fault)
    except NonFiniteError:
        return                                       # it read the poison as the kernel's word
    assert not (same(sent, payloads[0]) and same(found, total))


@pytest.mark.parametrize("name", NAMES)
def test_only_packed_bytes_cross(name):
    """A call's own payload goes down once and is not fetched again; the others' come up once."""
    traffic = Traffic()
    path = DevicePath(TORCH, "torch", CPU, traffic)
    coding = StagedCoding(lossy(name, 0, TORCH, traffic), path)
    payloads = [coding.encode(*summands()[0]), *wanted(name)[0][1:]]
    size = coding.size(FIRST, COUNT)
    assert [payload.numel() for payload in payloads] == [size] * WORLD
    assert (traffic.bytes_down, traffic.bytes_up) == (HEADER + size, 0)
    total = coding.total(payloads, FIRST, COUNT, torch.float32)
    assert same(total, wanted(name)[1])
    assert traffic.bytes_up == (WORLD - 1) * (-(-(size - 1) // ALIGN) * ALIGN) and traffic.bytes_down == HEADER + size
    bits = {"int4_outliers": 4.5, "int4_group32": 4.6, "int8_group32": 8.6}[name]               # of a short call, all that is added counted
    assert 8 * traffic.bytes_down <= bits * COUNT
    assert traffic.total().values == COUNT and traffic.total().nbytes == size


def test_runs_are_sent_while_later_ones_are_packed():
    """The first payload is waited for when the last has been begun, and no payload before it is asked for."""
    path = LatePath(TORCH, Traffic())
    coding = StagedCoding(lossy("int4_group32", 0, path.kernels), path)
    runs = coding.encode_runs(values_of(96, torch.float32, 1, 0), [32, 32, 32], [0, 32, 64])
    first = next(runs)
    assert path.main.begun == 3 and path.main.done == 1 and first.numel() == 2 + 16 + 1
    assert [each.numel() for each in runs] == [19, 19] and path.main.done == 3


@pytest.mark.parametrize("make", [
    lambda each: StagedCoding(each, DevicePath(TORCH, "torch", CPU, Traffic())), ResidentCoding,
], ids=["staged", "resident"])
@pytest.mark.parametrize("name", NAMES)
def test_every_piece_says_that_one_was_refused(name, make):
    values = values_of(300, torch.float32, 3, 0)
    values[150] = math.inf
    counts, firsts = [100, 0, 100, 100], [0, 100, 100, 200]
    host, device = lossy(name, 1, TORCH), make(lossy(name, 1, TORCH))
    expected, found = host.encode_pieces(values, counts, firsts), device.encode_pieces(values, counts, firsts)
    assert found[1] is None and all(same(one, other) for one, other in zip(found, expected) if one is not None)
    assert found[0][-1] == found[2][-1] == found[3][-1] == 2 and not found[2][:-1].any()
    said = []
    for coding in (host, device):
        with pytest.raises(NonFiniteError) as error:
            coding.finish()
        said.append(str(error.value))
    assert said[0] == said[1]


def test_a_sum_that_is_not_finite_is_refused_on_the_device():
    for coding in (ResidentCoding(lossy("int4_group32", 0, TORCH)), ResidentCoding(lossy("int4_group32", 0, ThroughHost(TORCH)))):
        payload = coding.encode(torch.tensor([1.0, math.nan]), 0, SUM)
        assert payload.tolist() == [0, 0, 0, 255]
        with pytest.raises(NonFiniteError, match=r"the sum at layers\.0\.o_proj, taken by rank 0"):
            coding.finish()


# ---- which kernels, and why not ------------------------------------------------------------------------------------------------------


class Fused(type(TORCH)):
    """As a compiler makes them that fuses multiply-adds: right to a rounding."""

    def unpack_groups(self, body, bits, out, accumulate):
        found = torch.zeros(out.numel(), dtype=torch.float64)
        wide = torch.zeros_like(out)
        super().unpack_groups(body, bits, wide, False)
        found += wide.double() * (1 + 2.0**-23)
        out.copy_(out + found if accumulate else found)


class Careless(type(TORCH)):
    """Right but for one value."""

    def pack_features(self, values, first, table, body):
        told = super().pack_features(values, first, table, body)
        body[-3] ^= 1
        return told


class Broken(type(TORCH)):
    def pack_groups(self, values, bits, body):
        raise KeyError("no such symbol")


@pytest.mark.parametrize(("kernels", "name", "text"), [
    (Fused(), "int8_group32", "reads other values than the definition"), (Careless(), "int4_outliers", r"writes other bytes .*\(1 of \d+"),
    (Broken(), "int4_group32", r"its codec kernels fail \(KeyError: 'no such symbol'\)"),
])
def test_kernels_that_disagree_do_not_serve(kernels, name, text, caplog):
    codecs = Codecs(0, 2)
    codecs.paths[CPU] = DevicePath(kernels, "mychip", CPU, codecs.traffic)
    with caplog.at_level("INFO", "hetero_attn"):
        for _ in range(2):
            assert codecs.path(CPU, name, torch.bfloat16) is None
    assert len(caplog.records) == 1 and caplog.records[0].getMessage() == f"sums under a codec are {codecs.traffic.packing}"
    assert re.search(text, codecs.traffic.packing)
    assert codecs.traffic.packing.startswith("packed on the host: mychip: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_definition_agrees_with_itself(name, dtype):
    assert disagreement(TORCH, name, dtype, CPU) is None and disagreement(codec.kernels("cpu"), name, dtype, CPU) is None


def test_a_device_without_kernels_goes_through_the_host_and_says_why():
    codecs = Codecs(0, 2)
    coding = codecs.coding("int4_group32", "s", 8, torch.float32, torch.device("meta"))
    assert isinstance(coding, GroupCoding) and not coding.on_device
    assert "packed on the host: " in codecs.traffic.packing and "no codec kernels for meta" in codecs.traffic.packing
    assert isinstance(codecs.coding("int4_group32", "s", 8, torch.float32, torch.device("meta"), resident=True), ResidentCoding)


def test_what_crossed_is_told():
    traffic = Traffic()
    traffic.packing, traffic.bytes_down, traffic.bytes_up = "packed on cuda:0 by triton", 2048, 4096
    traffic.add("s", 100, 53, 0)
    assert traffic.summary().endswith("none saturated; packed on cuda:0 by triton (2 KiB to the host, 4 KiB back)")
    traffic.clear()
    assert traffic.summary() == "" and traffic.packing


def test_a_landing_tells_what_its_kernel_told():
    class Done:
        def synchronize(self):
            memory[:HEADER].view(torch.int64).fill_(-1)

    memory = torch.zeros(HEADER + 3, dtype=torch.uint8)
    assert Landing(memory, Done()).wait()[0] == -1
