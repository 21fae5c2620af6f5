"""A lost rank: the same text all the same. A stranger: named before anything is sent."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("transformers", reason="transformers writes the checkpoints these tests read")

from test_cli_generate_ranks import alive, ranks_of, start
from tiny_checkpoint import write_checkpoint

from hetero_attn.collectives import init_communicator
from hetero_attn.communicator import CommunicatorError, SoloCommunicator
from hetero_attn.models import restart
from hetero_attn.models.generate import generate
from hetero_attn.models.load import load_model
from hetero_attn.models.restart import RestartLog
from hetero_attn.models.sampling import SamplingParams
from hetero_attn.parallel.challenge import answer, challenge
from hetero_attn.parallel.launch import run_ranks

pytestmark = pytest.mark.ranks
PROMPTS = [[30, 40, 50], [60, 70, 80, 90]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), context_length=1024)


class Lost(Exception):
    pass


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("after", [1, 7, 19])
def test_a_generation_goes_on_from_its_last_token(folder, tmp_path, temperature, after):
    model = load_model(folder, "cpu", communicator=SoloCommunicator())
    params = SamplingParams(max_new_tokens=16, temperature=temperature, seed=5, ignore_eos=True, repetition_penalty=1.1)
    expected = [each.token_ids for each in generate(model, PROMPTS, params)]
    log = RestartLog(tmp_path / "log", PROMPTS, params)
    assert (tmp_path / "log").stat().st_mode & 0o077 == 0
    left = [after]

    def stop(piece):
        left[0] -= 1
        if not left[0]:
            raise Lost

    with pytest.raises(Lost):
        generate(model, PROMPTS, params, log=log, stream=stop)
    again = RestartLog(tmp_path / "log", PROMPTS, params)
    assert again.tokens >= after
    found = [each.token_ids for each in generate(load_model(folder, "cpu", communicator=SoloCommunicator()), PROMPTS, params, log=again)]
    assert found == expected
    other = RestartLog(tmp_path / "log", PROMPTS[:1], params)                                  # another request begins anew
    assert other.tokens == 0


@pytest.mark.parametrize("half", ['{"sho', '{"shown": 7}', "\x00\x00", "7"], ids=["cut", "no newline", "zeros", "no object"])
def test_half_a_line_costs_that_line_alone(tmp_path, half):
    """A full disk or a power cut leaves part of a line, which must not swallow the ones that follow it."""
    params = SamplingParams(seed=3)
    RestartLog(tmp_path / "log", ["A"], params).note_shown(5)
    before = (tmp_path / "log").read_bytes()
    with open(tmp_path / "log", "a") as file:
        file.write(half)
    log = RestartLog(tmp_path / "log", ["A"], params)
    assert log.shown == 5 and (tmp_path / "log").read_bytes() == before
    log.note_shown(9)
    log.note_shown(12)
    assert RestartLog(tmp_path / "log", ["A"], params).shown == 12


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("victim", [0, 1] if os.environ.get("HETERO_ATTN_FULL") else [1])
def test_a_killed_rank_costs_time_and_no_text(folder, tmp_path, victim):
    options = ("--prompt", "Hello", "--max-new-tokens", 300, "--ignore-eos", "--temperature", 0.8, "--seed", 3, "--profile", "edge",
               "--tp", 2)
    expected, _ = start(folder, *options).communicate(timeout=120)
    env_tmp = tmp_path / "tmp"
    env_tmp.mkdir()
    before = set(restart.folder().glob("*.jsonl"))
    process = start(folder, *options, "--restart", "--json", tmp=env_tmp)
    pids = ranks_of(env_tmp, 2)
    deadline = time.monotonic() + 60
    while not [log for log in set(restart.folder().glob("*.jsonl")) - before if log.read_text().count("\n") > 40]:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    (log,) = set(restart.folder().glob("*.jsonl")) - before
    os.kill(pids[victim], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()
    assert f"rank {victim} failed: ended by SIGKILL; starting the ranks again" in err.decode() and "going on after" in err.decode()
    text = json.loads(out)["results"][0]["text"]
    assert text.removesuffix("\n") == expected.decode().removesuffix("\n")
    assert not any(map(alive, pids.values())) and not log.exists()


MEETINGS = [(["a", "a", "a"], []), ([None, None, None], []), (["a", "a", "b"], [2]), (["a", None, "a"], [1]), (["b", "a", "a"], [0])]


def meet():
    """What each meeting's challenge says on this rank; a challenge that fails leaves the ranks in step."""
    said = []
    with init_communicator("cpu") as communicator:
        for tokens, _ in MEETINGS:
            try:
                challenge(communicator, tokens[communicator.rank])
                said.append("")
            except CommunicatorError as error:
                said.append(str(error))
        communicator.barrier()
    return said


def test_a_rank_without_the_token_is_named():
    ranks = run_ranks(meet, (), 3, threads=1)
    for number, (_, who) in enumerate(MEETINGS):
        for rank in range(3):
            text = ranks[rank][number]
            if not who:
                assert text == ""
            elif rank not in who:
                assert f"rank {who[0]} does not know the token; set HETERO_ATTN_TOKEN" in text
            else:
                assert text


def test_an_answer_is_for_one_question():
    nonce, other = b"n" * 32, b"m" * 32
    assert len({answer("a", nonce, 0, 1), answer("a", nonce, 1, 0), answer("a", other, 0, 1), answer("b", nonce, 0, 1)}) == 4


@pytest.mark.parametrize("words", [("generate", "--prompt", "A"), ("tune",), ("tune", "--schedule"), ("calibrate", "--text", __file__)],
                         ids=" ".join)
def test_several_hosts_need_trust(folder, words):
    command, *options = words
    words = [command, *([str(folder)] if command != "tune" else []), *options, *([str(folder)] if "--schedule" in options else [])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0",
           "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "192.0.2.7", "MASTER_PORT": "29501"}
    ran = subprocess.run([sys.executable, "-m", "hetero_attn", *words], env=env, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2 and "192.0.2.7, which is not this host alone" in ran.stderr, ran.stderr
    assert f"give {command} --trust-network" in ran.stderr


def test_restart_needs_prompts_and_a_name(folder):
    process = start(folder, "--chat", "--restart")
    assert b"a conversation is not written down" in process.communicate(timeout=60)[1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torchruns_elastic_restart_goes_on_with_the_text(folder, tmp_path):
    """A worker killed under torchrun: its agent starts all ranks again, and what was shown before and after is the whole text."""
    options = ("--prompt", "Hello", "--max-new-tokens", 250, "--ignore-eos", "--temperature", 0.8, "--seed", 4, "--profile", "edge")
    expected, _ = start(folder, *options, "--tp", 2).communicate(timeout=120)
    before = set(restart.folder().glob("*.jsonl"))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2", "--monitor-interval=0.2", "-m",
                "hetero_attn")
    process = start(folder, *options, "--restart", launcher=launcher)
    deadline = time.monotonic() + 90
    while not [log for log in set(restart.folder().glob("*.jsonl")) - before if log.read_text().count("\n") > 30]:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    (worker,) = [pid for pid in children(process.pid) if b"RANK=1" in environment(pid)]
    os.kill(worker, signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "going on after" in err.decode(), err.decode()
    assert out.decode(errors="replace").removesuffix("\n") == expected.decode(errors="replace").removesuffix("\n")
    assert not set(restart.folder().glob("*.jsonl")) - before


def children(pid):
    return [int(each) for each in open(f"/proc/{pid}/task/{pid}/children").read().split()]


def environment(pid):
    return open(f"/proc/{pid}/environ", "rb").read().split(b"\0")
