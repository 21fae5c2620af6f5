"""gpu-check's collectives without a GPU: the suite and the replays on groups of CPU ranks, and what becomes of ranks that die, hang or err.

A backend made here, hetero_attn_ailing, has a communicator that ends or sleeps in the middle of the suite.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hetero_attn import registry
from hetero_attn.communicator import SoloCommunicator
from hetero_attn.testing.collective_behaviour import BEHAVIOURS
from hetero_attn.testing.collective_cases import CASES, FULL
from hetero_attn.testing.gpu import checks, group_graphs
from hetero_attn.testing.gpu.apart import outcome_of
from hetero_attn.testing.gpu.graph_seam import Repeated, seam_of
from hetero_attn.testing.gpu.group_graphs import Exchange, all_replayed, replayed
from hetero_attn.testing.gpu.group_suite import Journal, run_in, suite_on, summed
from hetero_attn.testing.gpu.groups import Group, groups_of
from hetero_attn.testing.gpu.outcome import FAILED, PASSED, SKIPPED, Figure, Outcome, judged
from hetero_attn.testing.rank_threads import on_threads

CPU, SHARE = torch.device("cpu"), 40
PAIR = Group("mixed", "distributed", ("cpu", "cpu"))
AILING = '''
import os, signal, time
from hetero_attn.backend import Backend
from hetero_attn.communicator import Communicator

class Ailing(Communicator):
    def broadcast(self, x, src=0, *, site=""):
        if self.rank == 1 and x.numel() == 12:
            if os.environ["AILS"] == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return self.base.broadcast(x, src, site=site)

class backend(Backend):
    name = "ailing"
    def communicator(self, base, profile):
        return Ailing(base.rank, base.world_size, base=base)
'''


def test_the_suite_makes_its_tensors_where_the_communicator_is():
    """With another default device nothing of it lands there: a wrapper would leave such tensors to its base, untested."""
    with SoloCommunicator() as communicator, torch.device("meta"):
        assert {name: words for name, check in BEHAVIOURS.items() if (words := check(communicator))} == {}


def test_groups_by_device():
    twin, alone, mixed = groups_of(torch.device("cuda", 0))
    assert str(twin) == "twin, hopper on cuda:0 and cuda:0" and str(mixed) == "mixed, distributed on cuda:0 and cpu"
    assert (alone.communicator, alone.devices) == ("solo", ("cuda:0",))


def test_what_ranks_wrote_is_read_together(tmp_path):
    lines = [["a", None], ["a", [None, "1"]], ["b", None], ["b", [None, "2"]], ["c", None]]
    (tmp_path / "rank.0").write_text("\n".join(map(json.dumps, [*lines, ["c", [None, "3"]]])))
    (tmp_path / "rank.1").write_text("\n".join(map(json.dumps, [*lines[:3], ["b", [None, "other"]], ["c", None]])) + '\n["d", nul')
    journals = [Journal.read(tmp_path / f"rank.{rank}") for rank in range(3)]
    assert journals[1].begun == "c" and not journals[0].begun and journals[2] == Journal({})
    found = summed(["a", "b", "c"], journals[:2])
    assert (found["passed"], found["failures"], found["left"]) == (1, 1, 1) and "the ranks' bits differ" in found["failed"]["b"]
    assert summed(["a"], journals) == {"passed": 0, "failures": 0, "failed": {}, "left": 1}
    erring = [Journal({"a": ("off by 1", "")}), Journal({})]
    assert summed(["a"], erring)["failed"] == {"a": "rank 0: off by 1"}


def test_a_fault_is_a_line_of_the_suite(tmp_path):
    class Doubles(SoloCommunicator):
        def all_reduce(self, x, *, site=""):
            return super().all_reduce(x, site=site).mul_(2)

    with Doubles() as communicator:
        run_in(communicator, SHARE, tmp_path / "rank.0")
    found = summed([case.name for case in CASES[::SHARE]], [Journal.read(tmp_path / "rank.0")])
    assert found["failures"] >= 2 and found["passed"] >= 2 and not found["left"]
    assert any(name.startswith("all_reduce-") and "are off" in words for name, words in found["failed"].items())


@pytest.mark.ranks
def test_the_suite_on_two_ranks_of_unlike_devices_names():
    status, lines, found = suite_on(PAIR, 120.0, SHARE)
    total = len(CASES[::SHARE]) + len(BEHAVIOURS)
    assert status == PASSED and found["passed"] == total, lines
    assert lines[0].startswith(f"{PAIR}: DistributedCommunicator: {total} of {total} cases passed, 0 failed, in "), lines


@pytest.fixture
def ailing(tmp_path, monkeypatch):
    (tmp_path / "hetero_attn_ailing").mkdir()
    (tmp_path / "hetero_attn_ailing" / "__init__.py").write_text(AILING)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._found.cache_clear()
    yield Group("twin", "ailing", ("cpu", "cpu"))
    registry._found.cache_clear()
    registry._instances.pop("ailing", None)


@pytest.mark.ranks
@pytest.mark.parametrize("ails, limit_s, words", [("dies", 120.0, "rank 1 failed: ended by SIGKILL"),
                                                  *([("hangs", 25.0, "the ranks were not done within 25 s")] if FULL else [])])
def test_what_a_rank_had_done_counts_when_it_dies_or_hangs(ailing, monkeypatch, ails, limit_s, words):
    monkeypatch.setenv("AILS", ails)
    began = time.monotonic()
    status, lines, found = suite_on(ailing, limit_s, 12)
    assert status == FAILED and time.monotonic() - began < 100
    assert words in lines[1] and "rank 1 was at broadcast-1-" in lines[1], lines
    assert found["passed"] >= 2 and found["left"] >= 10 and f"{found['left']} not reached" in lines[0]


def test_groups_that_cannot_be_had_are_skipped_with_the_reason():
    assert suite_on(Group("twin", "nothing", ("cpu", "cpu")), 1.0)[0] == SKIPPED
    status, lines = group_graphs.replays_on(Group("twin", "nothing", ("cpu", "cpu")), group_graphs.REHEARSAL, 1.0)
    assert status == SKIPPED and "there is no backend 'nothing' here; known are" in lines[0]


# ---- replays -----------------------------------------------------------------------------------------------------------------------


class Frozen(Repeated):
    """A graph whose replay does not run."""

    def captured(self, call):
        return super().captured(call)[0], lambda: None


class Failing(Repeated):
    """What is not allowed under a capture turns up in it, behind the calls that warm up."""

    def captured(self, call):
        super().captured(call)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize("exchange", group_graphs.REHEARSAL, ids=str)
def test_a_replay_that_does_nothing_is_seen(exchange):
    with SoloCommunicator() as communicator:
        assert replayed(communicator, exchange, Repeated()) is None
        assert "replay 1, result 0: other bits than a plain call's" in replayed(communicator, exchange, Frozen())
        assert replayed(communicator, exchange, Failing()) == (
            "the capture failed: RuntimeError: operation not permitted when stream is capturing")


def test_a_wrong_plain_call_is_seen():
    class Forgets(SoloCommunicator):
        def all_reduce(self, x, *, site=""):
            return x.mul_(1.5)

    with Forgets() as communicator:
        assert "a plain call, turn 1, result 0: " in replayed(communicator, Exchange("all_reduce", 3, 64), Repeated())


def test_ranks_stay_in_step_when_one_cannot_capture():
    def run(communicator):
        seam = Failing() if communicator.rank else Repeated()
        first = replayed(communicator, Exchange("reduce_scatter", 5, 64), seam)
        return first, all_replayed(communicator, group_graphs.REHEARSAL, Repeated())

    one, other = (outcome.result for outcome in on_threads(run, 2))
    assert one[0] == "rank 1 could not capture it" and other[0].startswith("the capture failed: RuntimeError")
    assert all(words is None for _, words in (*one[1], *other[1])) and len(one[1]) == len(group_graphs.REHEARSAL)


def test_a_broken_group_ends_the_replays():
    def run(communicator):
        if communicator.rank:
            return None
        return all_replayed(communicator, group_graphs.REHEARSAL, Repeated())

    found = on_threads(run, 2, timeout_s=1.0)[0].result
    assert len(found) == 1 and found[0][1].startswith("CommunicatorError: ")


def test_exchanges_that_a_gpu_gets_are_right_on_ranks():
    """The very list, ragged shards and started sums included, with the stand-in."""
    for outcome in on_threads(lambda communicator: all_replayed(communicator, group_graphs.EXCHANGES, seam_of(CPU)), 2):
        assert [each for each in outcome.result if each[1]] == []


# ---- processes of their own --------------------------------------------------------------------------------------------------------


def test_an_outcome_comes_back_from_a_child_as_it_was():
    outcome = judged("norm", [Figure("1024 tokens", 0.7, "GB/s", 0.8)], [("tokens", "us"), ("64", "3")])
    said = subprocess.CompletedProcess([], 0, "noise\n" + json.dumps(outcome.to_dict()) + "\n", "")
    assert outcome_of(said, 9.0) == outcome
    died = outcome_of(subprocess.CompletedProcess([], -11, "", "a\nCUDA error: an illegal memory access\n"), 9.0)
    assert died == Outcome(FAILED, "its process ended with -11: a | CUDA error: an illegal memory access")
    assert outcome_of(subprocess.CompletedProcess([], -9, "", ""), 9.0).text == "its process did not end within 9 s: it said nothing"


def test_checks_that_touch_groups_or_graphs_run_apart():
    assert {check.name for check in checks.CHECKS if check.apart} == {"twin", "alone", "mixed", "collectives", "graphs", "replays", "fused",
                                                                    "cooperation"}
    graphs = checks.selected("graphs")[0]
    outcome = checks.carried_out(graphs, checks.Run(CPU, deadline=time.monotonic() + 120))
    assert (outcome.status, outcome.text) == (SKIPPED, "cpu has no CUDA graphs")
    assert "the run's time is up" in checks.carried_out(graphs, checks.Run(CPU, deadline=time.monotonic() - 1)).text


def _marked(mark: str) -> list[int]:
    """Processes that run with MARK=mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            alive = f"MARK={mark}".encode() in (path / "environ").read_bytes()
        except OSError:
            continue
        if alive:
            found.append(int(path.name))
    return found


@pytest.mark.ranks
@pytest.mark.skipif(sys.platform != "linux", reason="children end with their parent on Linux")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_command_is_ended(tmp_path, number):
    mark = f"{os.getpid()}-{number}"
    command = [sys.executable, "-m", "hetero_attn.testing.gpu", "--rehearse", "--only", "mixed", "--page", str(tmp_path / "page.md")]
    process = subprocess.Popen(command, env=os.environ | {"MARK": mark}, cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while len(_marked(mark)) < 4 and time.monotonic() < deadline:         # itself, the check, two ranks
            time.sleep(0.05)
        assert len(_marked(mark)) >= 4
        process.send_signal(number)
        assert process.wait(30) == (143 if number == signal.SIGTERM else -9)
        while _marked(mark) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert _marked(mark) == []
    finally:
        process.kill()
        process.wait()
