"""make bench-edge's verdicts: a made-up record passes, one value beyond its bar fails that verdict alone; old records still render."""

import copy
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from edge import accelerate, report, throttle, verdicts  # noqa: E402  (a folder of the repository, not of the package)

GB = 1 << 30


def rank(**others):
    return {"peak": 1000, "budget": 1000, "predicted": 1000, "read_bytes": 10**9, "disk_s": 4.0, "compute_s": 1.0, "reduce_s": 0.5,
            "plan_token_s": 4.0, "first_s": 5.0, "token_s": 4.0} | others


def window():
    return {"prompt": 2.0, "token": 2.0, "disk": 2.0, "peak": 900, "ring": 500, "base": 400, "plan_token_s": 2.0, "rest_s": 0.5}


def passing():
    ours = {"model": "m", "mbytes_s": 250.0, "how": "io.max", "budget": "1MiB", "torch_bytes": 200, "ranks": [rank(), rank()]}
    theirs = {"model": "m", "mbytes_s": 250.0, "how": "io.max", "peak": 3000, "anonymous": 900, "max_memory": "1MB", "first_s": 13.0,
              "token_s": 12.0, "read_bytes": 10**9, "torch_bytes": 200}
    return {
        "main": {"run": {"model": "m", "ranks": [rank(), rank()]}},
        "bits": {"run": {"equal": True, "tokens": 3, "compared": "all of it"}},
        "ablation": {"held": {"prompt_s": 1.0, "token_s": 0.1}, "windows": [{"1": window(), "2": window()} for _ in range(2)]},
        "accelerate": {"limited, ours": ours, "limited, Accelerate": theirs, "as it is, ours": copy.deepcopy(ours),
                       "as it is, Accelerate": copy.deepcopy(theirs)},
        "seventy": {"rank 0": rank(peak=GB, budget=GB, predicted=GB)},
        "links": {"4 ranks": {"ranks": 4, "token_s": {"products alone": 0.1, "star": 0.3, "auto": 0.2},
                              "routes": {"star": ["star", "none"], "auto": ["one_shot", "none"]},
                              "sums_s": {"star": [0.2, 0.2], "auto": [0.1, 0.1]}}},
    }


# (where, the last value that passes, the first that fails, what its verdict says)
BARS = [
    ("main run ranks 1 peak", 1050, 1051, "m, 2 ranks, rank 1: peak"),
    ("main run ranks 0 predicted", 910, 909, "m, 2 ranks, rank 0: peak"),
    ("main run ranks 0 token_s", 4.59, 4.61, "m, 2 ranks: token"),
    ("main run ranks 1 plan_token_s", 5.19, 5.21, "m, 2 ranks: planned"),
    ("bits run equal", True, False, "logits of 3 tokens"),
    ("ablation windows 0 1 token", 2.29, 2.31, "a window of 1 block: token"),
    ("ablation windows 0 1 prompt", 2.29, 2.31, "a window of 1 block: prompt"),
    ("ablation windows 0 2 prompt", 2.29, 2.31, "a window of 2 blocks: prompt"),
    ("ablation windows 1 2 plan_token_s", 2.59, 2.61, "a window of 2 blocks: planned"),
    ("accelerate limited, Accelerate token_s", 12.0, 11.9, "each process 250 MB/s"),
    ("accelerate limited, Accelerate peak", 3000, 2999, "the disk limited: peak memory"),
    ("accelerate as it is, Accelerate peak", 3000, 2999, "the disk as it is: peak memory"),
    ("accelerate limited, ours ranks 1 budget", 953, 952, "2 ranks, the disk limited, rank 1: peak"),
    ("accelerate as it is, ours ranks 0 token_s", 4.59, 4.61, "2 ranks, the disk as it is: token"),
    ("accelerate as it is, ours ranks 1 plan_token_s", 5.19, 5.21, "2 ranks, the disk as it is: planned"),
    ("seventy rank 0 peak", GB, GB + 1, "70B shape, rank 0 of 8: peak 1.00 GiB (at most"),
    ("seventy rank 0 predicted", GB / 1.1 + 1, GB / 1.1 - 1, "70B shape, rank 0 of 8: peak 1.00 GiB, "),
    ("seventy rank 0 token_s", 4.59, 4.61, "70B shape, rank 0 of 8: token"),
    ("seventy rank 0 plan_token_s", 5.19, 5.21, "70B shape, rank 0 of 8: planned"),
    ("links 4 ranks token_s star", 0.389, 0.391, "4 ranks behind links, star: token"),
    ("links 4 ranks token_s auto", 0.155, 0.153, "4 ranks behind links, auto: token"),
]
STEPS = ["limited, Accelerate", "as it is, Accelerate", "limited, ours", "as it is, ours", "rank 0", "4 ranks"]


def put(results, where, value):
    keys = []
    while where:
        key = next((step for step in STEPS if where.startswith(step)), where.split()[0])
        keys.append(key)
        where = where[len(key):].lstrip()
    at = results
    for key in keys[:-1]:
        at = at[int(key)] if isinstance(at, list) else at[key]
    assert keys[-1] in at
    at[keys[-1]] = value


def failing(results):
    return [text for text, passed in verdicts.verdicts(results) if not passed]


def test_every_verdict_has_a_bar_that_is_tried():
    said = [text for text, _ in verdicts.verdicts(passing())]
    assert not failing(passing()) and len(set(said)) == len(said)
    tried = [next(text for text in said if text.startswith(says)) for *_, says in BARS]
    assert set(map(kind, said)) == set(map(kind, tried)) and len(set(map(kind, said))) >= 9


def kind(text):
    """A verdict without whom it is about and without its figures."""
    return re.sub(r"[\d.]+", "#", text.partition(": ")[2])


@pytest.mark.parametrize("where, passes, fails, says", BARS, ids=[bar[0] for bar in BARS])
def test_a_bar_just_met_and_just_missed(where, passes, fails, says):
    results = passing()
    put(results, where, passes)
    assert not failing(results)
    put(results, where, fails)
    (text,) = failing(results)
    assert text.startswith(says)
    assert f"- FAIL: {text}" in report.markdown(results, None)


def test_an_old_record_says_what_it_does_not_know():
    results = passing()
    del results["bits"]["run"]["compared"]
    for step in results["accelerate"].values():
        del step["torch_bytes"]
    text = report.markdown(results, None)
    assert "how much of each row: not recorded" in text and "torch alone: not recorded" in text
    assert "torch alone: 200 B of each, beyond it 3.50x" in report.markdown(passing(), None)


def test_slower_than_accelerate_is_said():
    assert "we were slower" not in report.markdown(passing(), None)
    results = passing()
    results["accelerate"]["as it is, Accelerate"]["token_s"] = 2.0
    assert "we were slower: a token took 2.00 times Accelerate's" in report.markdown(results, None)


def test_the_published_page_is_its_record():
    folder = ROOT / "docs" / "measured"
    assert report.markdown(json.loads((folder / "edge.json").read_text()), "edge.png") == (folder / "edge.md").read_text()


def test_part_of_a_record_is_a_report_too():
    assert "FAIL" not in report.markdown({"bits": passing()["bits"]}, None) and report.markdown({}, None)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_torch_alone_takes_is_measured():
    assert 50 << 20 < accelerate.torch_alone() < 1 << 30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Control groups as files: (version 1, version 2)."""
    for name in ("VERSION_1", "VERSION_2"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(throttle, name, tmp_path / name)
    monkeypatch.setattr(throttle, "disk_of", lambda folder: "8:0")
    return throttle.VERSION_1, throttle.VERSION_2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("seen", [True, False], ids=["own group", "own group out of sight"])
def test_a_process_goes_back_to_where_it_was(groups, monkeypatch, seen):
    _, root = groups
    monkeypatch.setattr(throttle, "_own_group", lambda first: "jobs/one")
    back = root / "cgroup.procs"
    back.write_text("")
    if seen:
        (root / "jobs" / "one").mkdir(parents=True)
        back = root / "jobs" / "one" / "cgroup.procs"
        back.write_text("")
    with throttle.limited("/", 250.0):
        assert (root / f"{throttle.PREFIX}{os.getpid()}" / "io.max").read_text() == "8:0 rbps=250000000\n"
        assert not back.read_text()
    assert back.read_text() == str(os.getpid())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_sweeping_leaves_the_groups_of_the_living(groups):
    gone = 1 + int(Path("/proc/sys/kernel/pid_max").read_text())
    for root in groups:
        for pid in (os.getpid(), gone):
            (root / f"{throttle.PREFIX}{pid}").mkdir()
    assert throttle.sweep() == 2
    assert all([each.name for each in root.iterdir()] == [f"{throttle.PREFIX}{os.getpid()}"] for root in groups)


def test_one_answer_to_which_version_it_is(groups):
    first, _ = groups
    assert throttle.described() == "io.max, version 2"           # the folder of version 1 may be there with nothing in it
    (first / "blkio.throttle.read_bps_device").write_text("")
    assert throttle.described().endswith("version 1")


def test_logits_are_compared_over_the_whole_row():
    from edge.ranks import greedy

    from hetero_attn.communicator import SoloCommunicator
    from hetero_attn.models.load import load_model

    model = load_model(ROOT / "examples" / "tiny-llama", "cpu", communicator=SoloCommunicator(), cache_tokens=128)
    _, tokens, rows = greedy(model, 3)
    assert greedy(model, 3)[2] == rows and len(set(rows)) == 3
    model.lm_head.register_forward_hook(lambda module, given, logits: torch.cat((logits[:, :-1], logits[:, -1:] - 1), -1))
    assert greedy(model, 3)[1] == tokens and not set(greedy(model, 3)[2]) & set(rows)
