"""The generate command in real processes: ranks of its own, torchrun's, a reader that goes away, a killed rank, Ctrl-C on a terminal."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_checkpoint import write_checkpoint

from hetero_attn.communicator import SoloCommunicator
from hetero_attn.models.generate import generate
from hetero_attn.models.load import load_model
from hetero_attn.models.sampling import SamplingParams

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(folder):
    """12 tokens after "Hello", from the library on one rank."""
    model = load_model(folder, "cpu", communicator=SoloCommunicator())
    return generate(model, ["Hello"], SamplingParams(max_new_tokens=12))[0].text


def start(folder, *args, tmp=None, launcher=("-m", "hetero_attn"), **options):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **({"TMPDIR": str(tmp)} if tmp else {})}
    command = [sys.executable, *launcher, "generate", str(folder), *map(str, args)]
    return subprocess.Popen(command, env=env, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})


@pytest.mark.parametrize("tp", [1, 2])
def test_a_reader_that_goes_away_ends_the_command_quietly(folder, tp):
    process = start(folder, "--prompt", "Hello", "--max-new-tokens", 120, "--ignore-eos", "--tp", tp)
    assert process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(60) == 141 and "Traceback" not in errors and "error" not in errors.lower()


@pytest.mark.parametrize("tp", [1, 2])
def test_closed_streams_are_empty_ones(folder, tp):
    command = [sys.executable, "-m", "hetero_attn", "generate", str(folder), "--chat", "--tp", str(tp)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(["sh", "-c", '"$@" <&- >&-', "sh", *command], env=env, stderr=subprocess.PIPE, timeout=60)
    assert process.returncode == 0 and b"error" not in process.stderr, process.stderr.decode()


def test_two_ranks_stream_the_text_of_one(folder, text):
    out, err = start(folder, "--prompt", "Hello", "--max-new-tokens", 12, "--tp", 2, "--vocabulary", "master").communicate(timeout=120)
    assert out.decode().removesuffix("\n") == text.removesuffix("\n"), err.decode()
    assert "tp 2" in err.decode().splitlines()[-1] and err.count(b"loading weights") == 1


def test_what_a_codec_packed_is_told_at_the_end(folder):
    out, err = start(folder, "--prompt", "Hello", "--max-new-tokens", 4, "--tp", 2, "--json", "--set", "codec=int8_group32").communicate(
        timeout=120)
    told = json.loads(out)["codec"]
    assert told["values"] > 0 and 8 < told["bits_per_value"] < 12 and told["saturated"] == 0 and told["saturated_at"] == {}, err.decode()
    assert f"codec, on rank 0: {told['values']} values at {told['sites']} sites" in err.decode() and "none saturated" in err.decode()


def test_under_torchrun_the_command_joins_the_ranks(folder, text, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "hetero_attn")
    (tmp_path / "prompt").write_text("Hello")
    with open(tmp_path / "prompt") as stdin:
        process = start(folder, "-", "--max-new-tokens", 12, "--json", launcher=launcher, stdin=stdin)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()
    facts = json.loads(out)
    assert facts["tp"] == 2 and [result["text"] for result in facts["results"]] == [text]


def ranks_of(tmp, count, deadline_s=60):
    """The ranks' process ids, from the files in which run_ranks keeps them."""
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        found = {path.suffix[1:]: path.read_text() for path in tmp.glob("hetero-attn-ranks-*/pid.*")}
        if len(found) == count and all(found.values()):
            return {int(rank): int(pid) for rank, pid in found.items()}
        time.sleep(0.05)
    raise AssertionError("the ranks did not start")


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killing_one_rank_ends_all_of_them_and_names_it(tmp_path):
    folder = write_checkpoint(tmp_path / "model", context_length=8192)
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    process = start(folder, "--prompt", "Hello", "--max-new-tokens", 8000, "--ignore-eos", "--tp", 4, tmp=tmp)
    pids = ranks_of(tmp, 4)
    assert process.stdout.read(8)                                       # it is generating
    os.kill(pids[2], signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - killed < 15
    last = err.decode().splitlines()[-1]
    assert process.returncode == 1 and last == "hetero-attn: error: rank 2 failed: ended by SIGKILL"
    assert err.decode().count("error") == 1 and "Traceback" not in err.decode()
    assert not any(map(alive, pids.values())) and list(tmp.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo-terminal and /proc")
def test_a_conversation_on_a_terminal_with_two_ranks_until_ctrl_c(folder, tmp_path):
    import pty

    ours, theirs = pty.openpty()
    process = start(folder, "--chat", "--tp", 2, "--max-new-tokens", 5, "--json", tmp=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs,
                    start_new_session=True, preexec_fn=controlling_terminal)
    os.close(theirs)
    shown = ""

    def until(text, deadline_s=60):
        nonlocal shown
        deadline, before = time.monotonic() + deadline_s, len(shown)
        while text not in shown[before:]:
            assert time.monotonic() < deadline, shown
            shown += os.read(ours, 1000).decode(errors="replace")

    until(">>> ")
    os.write(ours, b"hi\n")
    until(">>> ")
    pids = ranks_of(tmp_path, 2)
    interrupted = time.monotonic()
    os.write(ours, b"\x03")                                              # the terminal sends SIGINT to all of its processes
    with contextlib.suppress(OSError):                                  # reading a terminal that nobody holds any more is an error
        while os.read(ours, 1000):
            pass
    assert process.wait(30) == 130 and time.monotonic() - interrupted < 15
    assert not any(map(alive, pids.values()))
    assert "Traceback" not in shown and "error" not in shown


def controlling_terminal():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
