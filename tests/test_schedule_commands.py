"""generate --trace, tune --schedule and the profile's `schedule`, as a user meets them: real ranks, the repository's own small model."""

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from hetero_attn.cli.output import uncut
from hetero_attn.cli.request import _trace
from hetero_attn.parallel import trace_file
from hetero_attn.parallel.schedule_choice import Auto, Places, Plain, Schedule, Weave
from hetero_attn.parallel.schedule_cost import Costs
from hetero_attn.parallel.trace import Event, chrome_trace
from hetero_attn.parallel.trace_file import objection, settled, write_trace

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "tiny-llama"
PROMPT = "def fibonacci(n):\n    " * 12


def command(*words, config, **environment):
    return subprocess.run(
        [sys.executable, "-m", "hetero_attn", *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}", "HETERO_ATTN_CONFIG_DIR": str(config), **environment},
    )


def generate(config, *words):
    return command("generate", MODEL, "--prompt", PROMPT, "--max-new-tokens", 4, "--temperature", 0, "--json", "--dtype", "float32", *words,
                   config=config)


def beside(tasks, rank):
    """Microseconds in which a rank's lanes both had something to do."""
    lanes = [[(event["ts"], event["ts"] + event["dur"]) for event in tasks if event["pid"] == rank and event["cat"] == lane]
             for lane in ("compute", "communication")]
    # a tenth of a microsecond is what times are rounded to
    return sum(max(0, min(end, other_end) - max(begin, other) - 0.3) for begin, end in lanes[0] for other, other_end in lanes[1])


@pytest.mark.ranks
def test_a_trace_shows_both_lanes_of_every_rank(tmp_path):
    file = tmp_path / "out.json"
    done = generate(tmp_path, "--tp", 2, "--schedule", "weave", "--set", "overlap.min_tokens=32", "--set", "overlap.parts=3",
                    "--trace", file)
    assert done.returncode == 0 and done.stderr.strip().endswith(f"trace: {file}"), done.stderr
    events = json.loads(file.read_text())["traceEvents"]
    layers = json.loads((MODEL / "config.json").read_text())["num_hidden_layers"]
    tasks = [event for event in events if event["ph"] == "X"]
    for rank in (0, 1):
        assert beside(tasks, rank) > 0, "nothing was computed while anything was summed"
        for lane, expected in (("compute", 3 * 2 * 2 * layers), ("communication", 3 + 3 * 2 * layers)):
            own = sorted((event for event in tasks if event["pid"] == rank and event["cat"] == lane), key=lambda event: event["ts"])
            assert len(own) == expected                             # one step is cut, in three parts: two blocks a layer, two pieces each
            assert all(a["ts"] + a["dur"] <= b["ts"] + 1 for a, b in pairwise(own)), "one task at a time in a lane"
    assert {event["args"]["name"] for event in events if event["name"] == "thread_name"} == {"compute", "communication"}
    plain = generate(tmp_path, "--tp", 2, "--schedule", "plain", "--trace", file)
    tasks = [event for event in json.loads(file.read_text())["traceEvents"] if event["ph"] == "X"]
    assert beside(tasks, 0) == beside(tasks, 1) == 0 and "every step ran plain; --schedule weave cuts those of 128 tokens" in plain.stderr
    assert json.loads(plain.stdout)["results"][0]["token_ids"] == json.loads(done.stdout)["results"][0]["token_ids"]


def test_a_trace_that_cannot_be_is_refused_before_anything_runs(tmp_path):
    done = generate(tmp_path, "--trace", tmp_path / "out.json")
    assert done.returncode == 2 and "one rank does neither here: give --tp N" in done.stderr and "--placement N" in done.stderr
    done = generate(tmp_path, "--tp", 2, "--trace", tmp_path / "nowhere" / "out.json")
    assert done.returncode == 2 and "a folder that exists" in done.stderr and not list(tmp_path.glob("**/*.json"))
    done = generate(tmp_path, "--schedule", "weave")
    assert done.returncode == 2 and "one rank sums nothing: give --tp N" in done.stderr


@pytest.mark.ranks
def test_tune_writes_what_it_measured_where_auto_finds_it(tmp_path):
    done = command("tune", "--schedule", MODEL, "--tp", 2, "--json", "--set", "dtype=float32", config=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["overlay"]).is_file() and [row["tokens"] for row in found["rows"]][:2] == [128, 256]
    assert all(set(row["seconds"]) == set(row["expected_s"]) == set(row["cuts"]) for row in found["rows"])
    shown = command("tune", "--schedule", MODEL, "--tp", 2, "--show", "--json", config=tmp_path)
    assert json.loads(shown.stdout)["measured"] == found["costs"]
    missing = command("tune", "--schedule", MODEL, "--tp", 3, "--show", config=tmp_path)
    assert missing.returncode and f"tune --schedule {MODEL} --tp 3" in missing.stderr
    again = generate(tmp_path, "--tp", 2)                           # auto, by that overlay
    assert again.returncode == 0 and "left aside" not in again.stderr, again.stderr
    other = generate(tmp_path, "--tp", 2, "--dtype", "bfloat16")
    assert other.returncode == 0 and "left aside, it holds for dtype float32, and here is dtype bfloat16" in other.stderr, other.stderr


def test_the_trace_is_chromes_and_written_whole_or_not_at_all(tmp_path):
    ranks = [[Event("compute", "inner a", 0.001, 0.003, 8, 0), Event("communication", "sum a", 0.003, 0.004, 8, 0)], []]
    found = chrome_trace(ranks)
    assert [event["ph"] for event in found["traceEvents"]].count("M") == 2 * 5
    first = next(event for event in found["traceEvents"] if event["ph"] == "X")
    assert (first["ts"], first["dur"], first["pid"], first["tid"], first["args"]) == (1000.0, 2000.0, 0, 0, {"rows": 8, "part": 0})
    write_trace(tmp_path / "a.json", ranks)
    assert json.loads((tmp_path / "a.json").read_text()) == found and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(TypeError):
        write_trace(tmp_path / "a.json", [[Event("compute", object(), 0, 1, 1, 0)]])
    assert json.loads((tmp_path / "a.json").read_text()) == found and len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_trace_takes_no_links_place_and_has_the_modes_that_files_have(tmp_path, umask):
    inside = tmp_path / "inside"
    inside.mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(inside / "real.json")
    assert objection(link) is None
    write_trace(link, [[]])
    assert link.is_symlink() and stat.S_IMODE((inside / "real.json").stat().st_mode) == 0o640
    (inside / "real.json").chmod(0o604)
    write_trace(link, [[], []])
    assert json.loads(link.read_text()) == chrome_trace([[], []]) and stat.S_IMODE(link.stat().st_mode) == 0o604
    assert [each.name for each in inside.iterdir()] == ["real.json"]
    write_trace(tmp_path / ("x" * 250), [[]])                       # a longer draft's name would be none


def test_a_trace_is_written_into_pipes_and_devices(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    assert objection(pipe) is None
    write_trace(pipe, [[]])
    reader.join(20)
    assert json.loads(read[0]) == chrome_trace([[]]) and stat.S_ISFIFO(pipe.stat().st_mode)
    read_end, write_end = os.pipe()
    own = settled(f"/dev/fd/{write_end}")                           # `>(gzip)`: ranks started from here have no such descriptor
    assert own == Path(f"/proc/{os.getpid()}/fd/{write_end}") and objection(own) is None
    write_trace(own, [[]])
    os.close(write_end)
    with open(read_end) as file:
        assert json.load(file) == chrome_trace([[]])
    ends = os.openpty()
    try:
        terminal = Path(os.ttyname(ends[1]))
        assert objection(terminal) is None and objection(os.devnull) is None
        write_trace(terminal, [[]])
        assert json.loads(os.read(ends[0], 1 << 16)) == chrome_trace([[]]) and stat.S_ISCHR(terminal.stat().st_mode)
    finally:
        for end in ends:
            os.close(end)


def test_a_path_that_takes_no_trace_is_known_beforehand(tmp_path, monkeypatch):
    for name in ("", tmp_path, tmp_path / "nowhere" / "a.json", "/dev/null/a.json"):
        assert "a file in a folder that exists" in objection(name)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert objection(loop) and "name a file" in objection(tmp_path / ("x" * 300))
    with socket.socket(socket.AF_UNIX) as own:
        own.bind(str(tmp_path / "socket"))
        assert "or a pipe" in objection(tmp_path / "socket")
    with open(tmp_path / "out.txt", "w") as own:
        monkeypatch.setattr(trace_file, "OWN_STREAMS", (own.fileno(),))
        assert "own output" in objection(f"/dev/fd/{own.fileno()}") and "own output" in objection(tmp_path / "out.txt")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)      # root may write anywhere
    (tmp_path / "a.json").touch()
    assert "folder cannot be written" in objection(tmp_path / "a.json")


def test_only_rank_0_needs_the_folder_of_the_trace():
    asked = SimpleNamespace(trace="/only/on/rank0/a.json")
    assert _trace(asked, 2, 1, None) == Path(asked.trace)
    with pytest.raises(ValueError, match="a folder that exists"):
        _trace(asked, 2, 0, None)


@pytest.mark.parametrize("schedule, expected", [
    (Weave(Places(64, 512)), "no step had the 512 tokens from which weave cuts: give a longer prompt, or --set overlap.min_tokens=N"),
    (Weave(Places(64, 2048)), "no step had the 2048 tokens from which weave cuts: steps take up to 1024; --set overlap.min_tokens=N"),
    (Auto(Places(64, 512), Costs({}, 0.0)), "auto cut no step: none had 512 tokens, or it would not have paid; give a longer prompt"),
    (Plain(Places(64, 512)), "every step ran plain, and none had the 64 tokens (overlap.shard_tokens)"),
    (Schedule(), "the device overlaps products and sums by itself"),
])
def test_a_trace_without_overlap_says_why_and_what_to_set(schedule, expected):
    model = SimpleNamespace(schedule=schedule, window=None, communicator=SimpleNamespace(world_size=2),
                            config=SimpleNamespace(experts=0), profile=SimpleNamespace(prefill_chunk=1024))
    assert uncut(model, True).startswith(expected)
