"""run_ranks and torchrun: results come back, failures are named, and nothing is left behind whoever is killed."""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from hetero_attn import init_communicator
from hetero_attn.parallel import launch
from hetero_attn.parallel.launch import RankFailure, run_ranks

ROOT = Path(__file__).parent.parent
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, uses prctl")
pytestmark = pytest.mark.ranks


def alive(pid):
    """Whether the process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} after {seconds} s"
        time.sleep(0.05)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """All temporary files of this process and its ranks go here."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def describe(text, tensor):
    with init_communicator("cpu", timeout_s=20) as communicator:
        total = communicator.all_reduce(tensor + communicator.rank)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "OMP_NUM_THREADS", "HETERO_TEST")
    environment = {name: os.environ[name] for name in names}
    return {"text": text, "total": total, "threads": torch.get_num_threads(), "pid": os.getpid(), **environment}


@linux
def test_results_environment_and_cleanliness(temporary, capfd):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    results = run_ranks(describe, ("costs $$5 ${local_rank}", torch.ones(2)), 2, env={"HETERO_TEST": "1"}, threads=1)
    for rank, result in enumerate(results):
        assert result["text"] == "costs $$5 ${local_rank}"
        assert result["total"].tolist() == [3.0, 3.0]
        assert (result["RANK"], result["LOCAL_RANK"], result["WORLD_SIZE"]) == (str(rank), str(rank), "2")
        assert (result["MASTER_ADDR"], result["threads"], result["OMP_NUM_THREADS"]) == ("127.0.0.1", 1, "1")
        assert not alive(result["pid"])
    assert {number: signal.getsignal(number) for number in before} == before
    assert list(temporary.iterdir()) == [] and "HETERO_TEST" not in os.environ
    assert capfd.readouterr().err == ""


def fail_on_rank_1(pids):
    rank = os.environ["RANK"]
    Path(pids, rank).write_text(str(os.getpid()))
    if rank == "1":
        raise KeyError("no such thing")
    time.sleep(60)


@linux
def test_an_exception_ends_all_ranks_with_one_error(temporary, tmp_path, capfd):
    began = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        run_ranks(fail_on_rank_1, (str(tmp_path),), 2)
    assert (caught.value.rank, caught.value.reason) == (1, "KeyError: 'no such thing'")
    assert "fail_on_rank_1" in caught.value.traceback and time.monotonic() - began < 30
    assert not any(alive((tmp_path / rank).read_text()) for rank in "01" if (tmp_path / rank).exists())
    assert list(temporary.iterdir()) == []
    assert capfd.readouterr().err == ""


def stop_or_hang(how):
    if how == "stop" and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "stop":
        raise RuntimeError("rank 0 is stopped")
    if how == "unpicklable":
        return lambda: None
    time.sleep(60)


@linux
def test_a_stopped_rank_does_not_hold_up_the_end(temporary):
    began = time.monotonic()
    with pytest.raises(RankFailure, match="rank 1 failed: RuntimeError: rank 0 is stopped"):
        run_ranks(stop_or_hang, ("stop",), 2)
    assert time.monotonic() - began < 25             # the launcher by itself would take 30 s and more
    assert list(temporary.iterdir()) == []


@linux
def test_time_limit_and_unpicklable_result():
    with pytest.raises(RankFailure, match="not done within 1 s"):
        run_ranks(stop_or_hang, ("hang",), 1, timeout_s=1)
    with pytest.raises(RankFailure, match=r"rank 0 failed: .*(pickle|local)"):
        run_ranks(stop_or_hang, ("unpicklable",), 1)


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="world_size is 0"):
        run_ranks(describe, (), 0)
    with pytest.raises(TypeError, match="top-level function"):
        run_ranks(lambda: None, (), 1)


PARENT = """
import os, sys, time
from pathlib import Path
from hetero_attn.parallel.launch import run_ranks

def sleep(folder):
    Path(folder, os.environ["RANK"] + ".part").write_text(str(os.getpid()))
    Path(folder, os.environ["RANK"] + ".part").rename(Path(folder, os.environ["RANK"]))
    time.sleep(120)

if __name__ == "__main__":
    run_ranks(sleep, (sys.argv[1],), int(sys.argv[2]))
"""


@linux
def test_ranks_end_with_their_parent_however_it_ends(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}", "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    parents = {}
    sizes = {signal.SIGKILL: 2, signal.SIGTERM: 1, signal.SIGINT: 1}            # side by side: starting takes seconds
    for number, size in sizes.items():
        folder = tmp_path / number.name
        folder.mkdir()
        command = [sys.executable, str(tmp_path / "parent.py"), str(folder), str(size)]
        parents[number] = folder, subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        for number, (folder, parent) in parents.items():
            last = folder / str(sizes[number] - 1)
            wait_for(lambda folder=folder, last=last: (folder / "0").exists() and last.exists(), 90, "ranks have not started")
            parent.send_signal(number)
        for number, (folder, parent) in parents.items():
            _, errors = parent.communicate(timeout=30)
            pids = [(folder / str(rank)).read_text() for rank in range(sizes[number])]
            wait_for(lambda pids=pids: not any(map(alive, pids)), 10, f"ranks outlive a parent ended by {number.name}")
            assert parent.returncode == -number
            # Killed outright, its resource tracker speaks for it; Ctrl-C is Python's own KeyboardInterrupt.
            ending = {signal.SIGKILL: "resource_tracker", signal.SIGTERM: "", signal.SIGINT: "KeyboardInterrupt"}[number]
            assert errors == "" or (ending and ending in errors)
        # Whoever is killed outright cannot tidy up; the others have.
        assert len(list(tmp_path.glob("hetero-attn-ranks-*"))) <= 1
    finally:
        for _, parent in parents.values():
            parent.kill()
            parent.wait()


UNDER_TORCHRUN = """
import torch
from hetero_attn import init_communicator
with init_communicator("cpu", timeout_s=20) as communicator:
    total = communicator.all_reduce(torch.tensor([communicator.rank + 1]))
    print("total", total.item(), "rank", communicator.rank, "of", communicator.world_size, flush=True)
"""


def test_torchrun_over_two_nodes(tmp_path):
    (tmp_path / "program.py").write_text(UNDER_TORCHRUN)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}", "OMP_NUM_THREADS": "1"}
    with launch.listen_on_loopback() as free:
        port = free.getsockname()[1]
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1",
             "--master-addr=127.0.0.1", f"--master-port={port}", str(tmp_path / "program.py")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for node in range(2)
    ]
    try:
        for node, process in enumerate(nodes):
            printed, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
            assert f"total 3 rank {node} of 2" in printed
    finally:
        for process in nodes:
            process.kill()
            process.wait()


def test_a_rank_failure_survives_pickling():
    failure = pickle.loads(pickle.dumps(RankFailure(3, "ended by SIGKILL", "text")))
    assert (failure.rank, failure.reason, failure.traceback) == (3, "ended by SIGKILL", "text")
    assert str(failure) == "rank 3 failed: ended by SIGKILL"


@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
def test_the_folder_of_a_launcher_that_was_killed_is_swept_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = {f"{launch.FOLDER}{gone.pid}-abc": False, f"{launch.FOLDER}{os.getpid()}-abc": True, f"{launch.FOLDER}mine": True}
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "pid.0").write_text("1")
    launch.sweep_abandoned()
    assert {name: (tmp_path / name).exists() for name in names} == names
