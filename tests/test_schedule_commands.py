"""generate --trace, tune --schedule and the profile's `schedule`, as a user meets them: real ranks, the repository's own small model."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from hetero_attn.parallel.trace import Event, chrome_trace, write_trace

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


@pytest.mark.ranks
def test_a_trace_shows_both_lanes_of_every_rank(tmp_path):
    file = tmp_path / "out.json"
    done = generate(tmp_path, "--tp", 2, "--set", "schedule=weave", "--set", "overlap.min_tokens=32", "--set", "overlap.parts=3",
                    "--trace", file)
    assert done.returncode == 0, done.stderr
    events = json.loads(file.read_text())["traceEvents"]
    layers = json.loads((MODEL / "config.json").read_text())["num_hidden_layers"]
    tasks = [event for event in events if event["ph"] == "X"]
    for rank in (0, 1):
        for lane, expected in (("compute", 3 * 2 * 2 * layers), ("communication", 3 + 3 * 2 * layers)):
            own = sorted((event for event in tasks if event["pid"] == rank and event["cat"] == lane), key=lambda event: event["ts"])
            assert len(own) == expected                             # one step is cut, in three parts: two blocks a layer, two pieces each
            assert all(a["ts"] + a["dur"] <= b["ts"] + 1 for a, b in pairwise(own)), "one task at a time in a lane"
    assert {event["args"]["name"] for event in events if event["name"] == "thread_name"} == {"compute", "communication"}
    plain = generate(tmp_path, "--tp", 2, "--set", "schedule=plain")
    assert json.loads(plain.stdout)["results"][0]["token_ids"] == json.loads(done.stdout)["results"][0]["token_ids"]


def test_a_trace_that_cannot_be_is_refused_before_anything_runs(tmp_path):
    done = generate(tmp_path, "--trace", tmp_path / "out.json")
    assert done.returncode == 2 and "one rank does neither here: give --tp N" in done.stderr and "--placement N" in done.stderr
    done = generate(tmp_path, "--tp", 2, "--trace", tmp_path / "nowhere" / "out.json")
    assert done.returncode == 2 and "a folder that exists" in done.stderr and not list(tmp_path.glob("**/*.json"))


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
