"""The communicator beyond its conformance suite: composed defaults, the suite's own eyesight, the choice among communicators."""

import contextlib
import itertools
import os
import socket

import pytest
import torch
import torch.distributed as dist

from hetero_attn import init_communicator
from hetero_attn.backend import Backend
from hetero_attn.collectives import choose_communicator, rendezvous
from hetero_attn.collectives.exchange import sum_in_rank_order
from hetero_attn.communicator import Communicator, CommunicatorError, SoloCommunicator, shard_counts, shard_rows
from hetero_attn.norm import rms_norm
from hetero_attn.profile import load_profile
from hetero_attn.testing import collectives
from hetero_attn.testing.collective_behaviour import BEHAVIOURS
from hetero_attn.testing.collective_cases import CASES, CollectiveCase, laid_out
from hetero_attn.testing.ranks import on_ranks

WORLD_SIZE = 2


class Composed(Communicator):
    """What somebody writes first: the three operations, everything else composed by the base class."""

    def __init__(self, inner):
        super().__init__(inner.rank, inner.world_size)
        self.inner = inner

    def all_reduce(self, x, *, site=""):
        return self.inner.all_reduce(x, site=site)

    def all_gather(self, x, dim=0, *, sizes=None, site=""):
        return self.inner.all_gather(x, dim, sizes=sizes, site=site)

    def broadcast(self, x, src=0, *, site=""):
        return self.inner.broadcast(x, src, site=site)


class Faulty(Communicator):
    """Wraps a right one and makes one mistake, which the suite has to see."""

    def __init__(self, inner, fault):
        super().__init__(inner.rank, inner.world_size, base=inner)
        self.fault = fault

    def all_reduce(self, x, *, site=""):
        before = x.clone()
        self.base.all_reduce(x, site=site)
        if self.fault == "other bits on one rank" and self.rank == 1 and x.dtype == torch.float32 and x.numel():
            x.view(-1)[0] = torch.nextafter(x.view(-1)[0], torch.tensor(torch.inf)) if x.is_contiguous() else x[0]
        if self.fault == "sums twice":
            x.add_(before)
        return x.clone() if self.fault == "returns a copy" else x

    def all_gather(self, x, dim=0, *, sizes=None, site=""):
        result = self.base.all_gather(x, dim, sizes=sizes, site=site)
        if self.fault == "writes its input" and x.is_floating_point():
            x.zero_()
        return result

    def broadcast(self, x, src=0, *, site=""):
        return self.base.broadcast(x, 0 if self.fault == "broadcasts from rank 0" else src, site=site)


FAULTS = {                                          # fault -> a case that must complain
    "other bits on one rank": CollectiveCase("all_reduce", torch.float32, (7, 5)),
    "sums twice": CollectiveCase("all_reduce", torch.bfloat16, (7, 5)),
    "returns a copy": CollectiveCase("all_reduce", torch.float16, (7, 5), "offset"),
    "writes its input": CollectiveCase("all_gather", torch.float32, (3, 4), "contiguous", "0"),
    "broadcasts from rank 0": CollectiveCase("broadcast", torch.float32, (3, 4), "contiguous", "1"),
}


def in_ranks(communicator):
    """Everything this file needs from real ranks, in one go."""
    done = {"composed": collectives.whole_suite(Composed(communicator))}
    done["faults"] = {fault: collectives.check_case(Faulty(communicator, fault), case) for fault, case in FAULTS.items()}
    done["gather"] = _refused(lambda: communicator.all_gather(torch.ones(2, 3 + communicator.rank)))
    mixed = torch.ones(2, dtype=torch.bfloat16 if communicator.rank else torch.float16)
    done["gather dtypes"] = _refused(lambda: communicator.all_gather(mixed))
    done["after"] = communicator.all_reduce(torch.ones(2)).tolist()
    done["second"] = _second(communicator)
    done["choices"] = _choices(communicator)
    done["listening"] = listening_addresses()
    done["batch"] = os.sched_getscheduler(0) == getattr(os, "SCHED_BATCH", None)
    done["repr"] = repr(communicator)
    started = [communicator.start_all_reduce(torch.ones(50_000, dtype=torch.bfloat16)) for _ in range(8)]
    started.append(communicator.start_all_reduce(torch.ones(3)))
    communicator.close()
    communicator.close()
    done["started before close"] = [_refused(lambda handle=handle: handle.wait().amax().item()) for handle in started]
    done["closed"] = _refused(lambda: communicator.all_reduce(torch.ones(2)))
    return done


def _refused(call):
    try:
        return f"no error: {call()}"
    except (ValueError, CommunicatorError) as error:
        return f"{type(error).__name__}: {error}"


def _second(first):
    """A second communicator beside the first, on the group that is there; closing it leaves the first alone."""
    with init_communicator("cpu", timeout_s=20) as second:
        summed = second.all_reduce(torch.ones(3)).tolist()
    return summed, first.all_reduce(torch.ones(3)).tolist()


class Chip(Backend):
    """A backend with a communicator on the ranks it is told to."""

    def __init__(self, willing_ranks):
        self.willing_ranks = willing_ranks

    def unavailable_reasons(self):
        return []

    def communicator(self, base, profile):
        return Faulty(base, "none") if base.rank in self.willing_ranks else [f"rank {base.rank} has no such chip"]


class BreakingChip(Chip):
    def communicator(self, base, profile):
        if base.rank not in self.willing_ranks:
            raise OSError("no room in /dev/shm")
        return super().communicator(base, profile)


class VagueChip(Chip):
    def communicator(self, base, profile):
        return "no such chip"


def _choices(base):
    """What is chosen for several lists: the class's name, and the reasons against the others."""
    import dataclasses

    from hetero_attn import registry

    chosen = {}
    chips = {"everywhere": Chip({0, 1}), "halfway": Chip({0}), "breaking": BreakingChip({0}), "vague": VagueChip({0, 1})}
    with contextlib.ExitStack() as stack:
        for name, chip in chips.items():
            stack.enter_context(registry.register(name, lambda chip=chip: chip))
        for names in ((name, "distributed") for name in (*chips, "nowhere")):
            communicator, reasons = choose_communicator(dataclasses.replace(load_profile("cpu"), communicators=names), base)
            result = communicator.all_reduce(torch.ones(1)).item()
            chosen[names[0]] = type(communicator).__name__, reasons.get(names[0]), result
    return chosen


def listening_addresses():
    """Local addresses of this process tree's listening TCP sockets, as /proc gives them (hexadecimal)."""
    inodes = set()
    for pid in {os.getpid(), os.getppid()}:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            try:
                target = os.readlink(entry.path)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as lines:
            for fields in map(str.split, lines.readlines()[1:]):
                if fields[3] == "0A" and fields[9] in inodes:
                    found.add(fields[1].rsplit(":", 1)[0])
    return sorted(found)


@pytest.fixture(scope="module")
def ranks():
    return [outcome.result if not outcome.error else pytest.fail(outcome.traceback) for outcome in on_ranks(in_ranks, (), WORLD_SIZE)]


@pytest.mark.ranks
@pytest.mark.parametrize("name", [*(case.name for case in CASES), *BEHAVIOURS])
def test_composed_defaults_pass_the_suite(ranks, name):
    complaints = [done["composed"][name][0] for done in ranks]
    assert complaints == [None] * WORLD_SIZE
    assert len({done["composed"][name][1] for done in ranks}) == 1


@pytest.mark.ranks
@pytest.mark.parametrize("fault", FAULTS)
def test_the_suite_sees_a_seeded_fault(ranks, fault):
    complaints = [done["faults"][fault] for done in ranks]
    assert any(complaint for complaint, _ in complaints) or len({digest for _, digest in complaints}) > 1


@pytest.mark.ranks
def test_all_gather_of_unlike_shapes_is_refused_by_every_rank_and_breaks_nothing(ranks):
    for done in ranks:
        assert "ValueError: all_gather" in done["gather"] and "[2, 3]" in done["gather"] and "[2, 4]" in done["gather"]
        assert "ValueError: all_gather" in done["gather dtypes"]
        assert "torch.float16" in done["gather dtypes"] and "torch.bfloat16" in done["gather dtypes"]
        assert done["after"] == [WORLD_SIZE, WORLD_SIZE]


@pytest.mark.ranks
def test_a_second_communicator_and_a_closed_one(ranks):
    for done in ranks:
        assert done["second"] == ([2.0] * 3, [2.0] * 3)
        assert "CommunicatorError" in done["closed"] and "closed" in done["closed"]
        assert done["started before close"] == ["no error: 2.0"] * 9


@pytest.mark.ranks
def test_the_choice_is_the_same_on_every_rank(ranks):
    for rank, done in enumerate(ranks):
        assert done["choices"]["everywhere"] == ("Faulty", [], 2.0)
        name, reasons, result = done["choices"]["halfway"]
        assert (name, result) == ("DistributedCommunicator", 2.0)
        assert reasons == ["rank 1 objects"] if rank == 0 else reasons == ["rank 1 has no such chip"]
        name, reasons, result = done["choices"]["breaking"]
        assert (name, result) == ("DistributedCommunicator", 2.0)
        assert reasons == (["rank 1 objects"] if rank == 0 else ["OSError: no room in /dev/shm"])
        assert done["choices"]["vague"][0] == "DistributedCommunicator" and "'no such chip'" in done["choices"]["vague"][1][0]
        assert done["choices"]["nowhere"][0] == "DistributedCommunicator"
        assert "nowhere" in done["choices"]["nowhere"][1][0]


@pytest.mark.ranks
@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="reads Linux's /proc/net/tcp")
def test_ranks_and_their_launcher_listen_on_loopback_only(ranks):
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    for done in ranks:
        assert done["listening"] and set(done["listening"]) <= loopback


@pytest.mark.ranks
@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux has SCHED_BATCH")
def test_cpu_ranks_run_as_batch(ranks):
    assert all(done["batch"] for done in ranks)


def test_a_world_of_one_needs_no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    communicator = init_communicator("cpu")
    assert isinstance(communicator, SoloCommunicator) and communicator.world_size == 1
    communicator.close()
    communicator.close()


@pytest.mark.parametrize(("variables", "words"), [
    ({"RANK": "two", "WORLD_SIZE": "4"}, ["RANK", "'two'", "torchrun"]),
    ({"RANK": "4", "WORLD_SIZE": "4"}, ["RANK is 4", "torchrun"]),
    ({"RANK": "1", "WORLD_SIZE": "4", "MASTER_PORT": ""}, ["MASTER_PORT", "torchrun"]),
])
def test_a_half_set_environment_is_explained(monkeypatch, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CommunicatorError) as error:
        init_communicator("cpu", timeout_s=1)
    assert all(word in str(error.value) for word in words)


@pytest.fixture
def no_agent(monkeypatch):
    """The environment of rank 0 of 2 where no torchrun serves the store; returns the port."""
    monkeypatch.setattr(rendezvous, "_serial", itertools.count())
    monkeypatch.setattr(rendezvous, "_stores", {})
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    return port


def test_without_an_agent_one_store_serves_all_communicators(no_agent):
    first, second = (rendezvous.open_store(rendezvous.World(0, 2, 0, 2), 5) for _ in range(2))
    first.set("key", "of the first")
    assert not second.check(["key"]) and first.check(["key"])


def test_a_port_in_use_is_explained(no_agent):
    with socket.create_server(("127.0.0.1", no_agent)), pytest.raises(CommunicatorError, match=f"{no_agent}.*in use"):
        rendezvous.open_store(rendezvous.World(0, 2, 0, 2), 5)


def test_a_store_that_ends_while_ranks_join_is_explained(no_agent):
    server = dist.TCPStore("127.0.0.1", no_agent, None, True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", no_agent, None, False)
    del server
    with pytest.raises(CommunicatorError, match="rank 1 of 2: rank 0 is gone") as error:
        rendezvous.exchange(client, rendezvous.World(1, 2, 1, 2), "device", "cpu", 5)
    assert error.value.missing == [0]


def test_a_device_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(ValueError, match="no device 'cuda'"):
        init_communicator("cpu", device="cuda")


@pytest.mark.parametrize(("devices", "library"), [
    (["a cuda 0", "a cuda 1", "b cuda 0"], "cuda"),
    (["a cuda 0", "a cuda 0"], None),               # NCCL refuses a device twice
    (["a cuda 0", "a cpu 0"], None),                # mixed: gloo, staged through host memory
    (["a npu 0", "a npu 1"], "npu"),
    (["a cpu 0", "a cpu 0"], None),
])
def test_device_library(monkeypatch, devices, library):
    monkeypatch.setattr(rendezvous.dist, "is_nccl_available", lambda: True)
    assert rendezvous.device_library(devices) == library


def test_rows_are_shared_out_completely():
    for world_size in range(1, 9):
        for total in range(0, 20):
            rows = [row for rank in range(world_size) for row in range(total)[shard_rows(total, rank, world_size)]]
            assert rows == list(range(total))
            assert shard_counts(world_size, total) == [
                len(range(total)[shard_rows(total, rank, world_size)]) for rank in range(world_size)
            ]


def test_half_sums_are_rounded_once():
    # 256 + 1 is lost in bf16 (spacing 2), so a sum that rounds at every step stays at 256.
    parts = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert sum_in_rank_order(parts, torch.bfloat16).item() == 258.0


def test_layouts_hold_the_values():
    values = torch.arange(35.0).view(7, 5)
    for layout in ("contiguous", "transposed", "offset", "strided"):
        x, memory = laid_out(values, layout)
        assert torch.equal(x, values) and x.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
        assert x.is_contiguous() == (layout in ("contiguous", "offset"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_follows_each_family_to_the_bit(dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRMSNorm(64, 1e-5)
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2").Gemma2RMSNorm(64, 1e-5)
    torch.manual_seed(0)
    x, weight = torch.randn(9, 64, dtype=dtype), torch.randn(64, dtype=dtype)
    with torch.no_grad():
        for module, offset in ((llama, 0.0), (gemma, 1.0)):
            module.weight = torch.nn.Parameter(weight)
            assert torch.equal(rms_norm(x, weight, 1e-5, offset), module(x))


def test_rms_norm_keeps_dtype_and_names_a_wrong_weight():
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    assert rms_norm(x, torch.ones(8), 1e-5).dtype == torch.bfloat16
    assert rms_norm(x.double(), torch.ones(8), 1e-5).dtype == torch.float64
    with pytest.raises(ValueError, match=r"weight is \[7\]"):
        rms_norm(x, torch.ones(7), 1e-5)


def test_a_communicator_must_define_the_three():
    with pytest.raises(NotImplementedError, match="all_reduce"):
        Communicator(0, 1).barrier()
    with pytest.raises(ValueError, match="rank is 2"):
        Communicator(2, 2)
