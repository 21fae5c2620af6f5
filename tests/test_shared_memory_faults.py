"""Ranks that are lost in a shared-memory collective, and ranks that wait: who is missing is said, nobody hangs, no core is burnt."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from hetero_attn import CommunicatorError
from hetero_attn.parallel.launch import RankFailure, run_ranks
from hetero_attn.testing.ranks import make_communicator

FOLDER, PREFIX = Path("/dev/shm"), "hetero-attn-"
pytestmark = [
    pytest.mark.ranks, pytest.mark.timeout(600),
    pytest.mark.skipif(not sys.platform.startswith("linux") or not FOLDER.is_dir(), reason="shared memory is for Linux with /dev/shm"),
]


def segments():
    return [path.name for path in FOLDER.glob(f"{PREFIX}*")] if FOLDER.is_dir() else []


def survive(folder, fault):
    """Rank 1 has the fault while the others are in the middle of calls; they write down what they see."""
    if os.environ["RANK"] != "1":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)        # the launcher would end the survivors before they could say anything
    communicator = make_communicator("cpu", timeout_s=2.0)
    x = torch.ones(300_000)
    communicator.all_reduce(x)
    if communicator.rank == 1:
        if fault == "killed":
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif fault == "stopped":
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGSTOP)).start()
        elif fault == "closed":
            communicator.close()
            time.sleep(6)
            return
        elif fault == "out of step":
            communicator.start_broadcast(torch.ones(9)).wait()
    began = time.monotonic()
    seen = {}
    try:
        while True:
            communicator.all_reduce(x.fill_(1.0), site="layers.1.o_proj")
            seen["last good"] = time.monotonic()
    except CommunicatorError as error:
        seen |= {"text": str(error), "missing": error.missing}
    seen["took"] = time.monotonic() - seen.pop("last good", began)
    for again in (lambda: communicator.all_reduce(x), communicator.barrier, lambda: communicator.start_all_reduce(x).wait()):
        with pytest.raises(CommunicatorError) as caught:
            again()
        assert str(caught.value) == seen["text"]
    began = time.monotonic()
    communicator.close()
    seen["close took"] = time.monotonic() - began
    part = Path(folder) / f"{communicator.rank}.part"
    part.write_text(json.dumps(seen))
    part.rename(part.with_suffix(".json"))
    sys.exit(1)


@pytest.mark.parametrize("fault", ["killed", "stopped", "closed", "out of step"])
def test_the_survivors_name_who_is_missing(monkeypatch, tmp_path, fault):
    from hetero_attn.parallel import rank_watch

    monkeypatch.setattr(rank_watch, "GRACE_S", 20.0 if fault == "killed" else 3.0)
    with pytest.raises(RankFailure):
        run_ranks(survive, (str(tmp_path), fault), 3, timeout_s=60)
    seen = {int(path.stem): json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(seen) >= {0, 2}
    for rank, saw in seen.items():
        assert f"rank {rank} of 3" in saw["text"] and saw["close took"] < 6, saw
        if fault == "out of step":
            assert saw["missing"] == [] and "every rank is alive" in saw["text"]
        else:
            assert saw["missing"] == [1] and "all_reduce of x [300000] float32 at layers.1.o_proj" in saw["text"], saw
        words = {"killed": "rank 1 has ended", "stopped": "rank 1 did not come", "closed": "rank 1 has closed its communicator",
                 "out of step": "made another call"}
        assert words[fault] in saw["text"], saw
        # seen at once or at the time-out, and two seconds for the roll call
        assert saw["took"] < (2 + 4 if fault == "stopped" else 4), saw
    assert segments() == []


def wait_idly():
    """Rank 0 waits 1.5 s for rank 1; the processor time that takes. Then Ctrl-C ends a wait that nobody else would end."""
    communicator = make_communicator("cpu", timeout_s=20.0)
    communicator.barrier()
    if communicator.rank == 1:
        time.sleep(1.5)
    before = time.process_time()
    communicator.barrier()
    burnt = time.process_time() - before
    if communicator.rank == 1:
        try:
            communicator.base.await_signal(0)                # while rank 0 waits in another collective
            time.sleep(0.1)
            communicator.barrier()
        except CommunicatorError as error:
            return str(error)
        return "no error"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    try:
        communicator.barrier(site="a")
    except KeyboardInterrupt:
        pass
    took = time.monotonic() - began
    try:
        communicator.barrier()
        later = "no error"
    except CommunicatorError as error:
        later = str(error)
    communicator.close()
    return burnt, took, later


def test_a_wait_burns_no_core_and_ctrl_c_ends_it():
    (burnt, took, later), other = run_ranks(wait_idly, (), 2, timeout_s=60)
    assert burnt < 0.3, f"{burnt:.2f} s of processor time in a wait of 1.5 s"
    assert 0.4 < took < 2.0 and "barrier at a was interrupted" in later
    assert "rank 0" in other and "no error" not in other
