"""Killed, stopped and late ranks: the others stop in time, with an error that names who is missing, and leave."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hetero_attn import CommunicatorError, init_communicator
from hetero_attn.parallel import launch, rank_watch
from hetero_attn.parallel.launch import RankFailure, run_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="POSIX signals")]
ROOT = Path(__file__).parent.parent
TIMEOUT_S = 1.5
SITE = "layers.1.o_proj"


def survive(folder, fault):
    """Rank 1 has the fault in the middle of things; the others write down what they get to see."""
    if os.environ["RANK"] != "1":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher would end the survivors before they could say anything
    communicator = init_communicator("cpu", timeout_s=TIMEOUT_S)
    for _ in range(3):
        communicator.all_reduce(torch.ones(64))
    if communicator.rank == 1:
        if fault == "late":
            time.sleep(3 * TIMEOUT_S)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    seen = {}
    handles = []
    began = time.monotonic()
    try:
        if fault == "signal":
            communicator.await_signal(1, site=SITE)
        handles = [communicator.start_all_reduce(torch.ones(2, 3), site=SITE) for _ in range(3)]
        handles.append(communicator.start_all_reduce(torch.ones(5, dtype=torch.bfloat16), site=SITE))
        handles[0].wait()
    except CommunicatorError as error:
        seen = {"text": str(error), "missing": error.missing, "operation": error.operation, "rank": error.rank}
    seen["took"] = time.monotonic() - began
    seen["later"] = []
    for again in (*(handle.wait for handle in handles), lambda: communicator.all_reduce(torch.ones(2)), communicator.barrier):
        began = time.monotonic()
        try:
            again()
            seen["later"].append("no error")
        except CommunicatorError as error:
            seen["later"].append("same" if str(error) == seen.get("text") else str(error))
        seen["later took"] = max(seen.get("later took", 0.0), time.monotonic() - began)
    began = time.monotonic()
    communicator.close()
    communicator.close()
    seen["close took"] = time.monotonic() - began
    part = Path(folder) / f"{communicator.rank}.part"
    part.write_text(json.dumps(seen))
    part.rename(part.with_suffix(".json"))
    sys.exit(1)                                      # the interpreter's own way out, through every destructor


def survivors(monkeypatch, tmp_path, fault, world_size):
    """What the survivors saw, by rank, and the failure of the whole."""
    # Time for the survivors, who ignore SIGTERM, to look around and write; when nobody has died they do so before the first exit.
    monkeypatch.setattr(rank_watch, "GRACE_S", 20.0 if fault == "killed" else 2.5)
    began = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        run_ranks(survive, (str(tmp_path), fault), world_size, timeout_s=60)
    failure = caught.value
    seen = {int(path.stem): json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(seen) == set(range(world_size)) - {1}, f"after {time.monotonic() - began:.0f} s: {failure}"
    assert time.monotonic() - began < 45
    return seen, failure


def check_common(rank, world_size, saw):
    assert saw["rank"] == rank and f"rank {rank} of {world_size}" in saw["text"] and SITE in saw["text"]
    assert set(saw["later"]) == {"same"} and saw["later took"] < 1.0
    assert saw["close took"] < 6.0


@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_the_survivors_name_the_missing_rank(monkeypatch, tmp_path, fault):
    seen, failure = survivors(monkeypatch, tmp_path, fault, 3)
    for rank, saw in seen.items():
        check_common(rank, 3, saw)
        assert saw["missing"] == [1]
        assert saw["operation"].startswith("all_reduce of x [") and "rank 1 does not answer" in saw["text"]
        assert f"rank {2 - rank} is alive" in saw["text"]
        assert saw["took"] < (8.0 if fault == "killed" else TIMEOUT_S + 8.0)
    if fault == "killed":
        assert (failure.rank, failure.reason) == (1, "ended by SIGKILL")


def test_a_late_rank_is_not_taken_for_dead(monkeypatch, tmp_path):
    seen, _ = survivors(monkeypatch, tmp_path, "late", 2)
    for rank, saw in seen.items():
        check_common(rank, 2, saw)
        assert saw["missing"] == [] and "every rank is alive" in saw["text"]
        assert "rank 1 is alive, outside any collective (last: all_reduce of x [64] float32, call" in saw["text"]


def test_waiting_for_a_signal_ends_with_its_source(monkeypatch, tmp_path):
    seen, _ = survivors(monkeypatch, tmp_path, "signal", 2)
    check_common(0, 2, seen[0])
    assert seen[0]["missing"] == [1] and "await_signal from rank 1" in seen[0]["text"]


def stall():
    communicator = init_communicator("cpu", timeout_s=TIMEOUT_S)
    communicator.all_reduce(torch.ones(64))
    if communicator.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    communicator.all_reduce(torch.ones(64), site=SITE)


def test_the_launcher_names_the_rank_that_stopped_and_not_the_one_that_noticed():
    with pytest.raises(RankFailure, match="rank 1 failed: it does not answer; CommunicatorError: rank 0 of 2: all_reduce") as caught:
        run_ranks(stall, (), 2, timeout_s=60)
    assert caught.value.rank == 1


def loop(folder):
    communicator = init_communicator("cpu", timeout_s=20)
    Path(folder, str(communicator.rank)).write_text(str(os.getpid()))
    for step in range(1_000_000):
        communicator.all_reduce(torch.ones(256), site=f"step.{step}")
        if step == 5 and communicator.rank == 2:
            Path(folder, "at").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


def test_killing_one_rank_of_four_ends_all_within_seconds(tmp_path, capfd):
    with pytest.raises(RankFailure, match="rank 2 failed: ended by SIGKILL"):
        run_ranks(loop, (str(tmp_path),), 4)
    assert time.time() - float((tmp_path / "at").read_text()) < 15
    for rank in range(4):
        pid = (tmp_path / str(rank)).read_text()
        assert not Path("/proc", pid).exists()
    assert "Traceback" not in capfd.readouterr().err


WITHOUT_AGENT = """
import os, signal, torch
from hetero_attn import CommunicatorError, init_communicator
communicator = init_communicator("cpu", timeout_s=5)
communicator.barrier()
if communicator.rank == 0:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    communicator.all_reduce(torch.ones(4), site="a")
    communicator.barrier()
except CommunicatorError as error:
    print(error.missing, error)
"""


def test_without_an_agent_rank_0_takes_the_store_with_it():
    with launch.listen_on_loopback() as free:
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        environment = {
            **os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}", "OMP_NUM_THREADS": "1",
            "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }
        ranks.append(subprocess.Popen([sys.executable, "-c", WITHOUT_AGENT], env=environment, stdout=-1, stderr=-1, text=True))
    try:
        printed, errors = ranks[1].communicate(timeout=60)
        assert ranks[1].returncode == 0, errors
        assert printed.startswith("[0] rank 1 of 2") and "rank 0 is gone" in printed
        assert ranks[0].wait(10) == -signal.SIGKILL
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
