"""make bench-cooperation's report is true to what ran: a small model, every way, the verdicts, and a seeded difference."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cooperation
from overlap.model import Shape


def test_the_bench_runs_and_its_verdicts_follow(monkeypatch, tmp_path, capsys):
    (tmp_path / "docs" / "measured").mkdir(parents=True)
    monkeypatch.setattr(cooperation, "ROOT", tmp_path)
    monkeypatch.setattr(cooperation, "SHAPE", Shape(hidden=64, layers=6, ffn=96, q_heads=4, kv_heads=4, vocab=64, dtype="float32"))
    monkeypatch.setattr(sys, "argv", ["cooperation.py", "--context", "192", "--chunk", "64", "--tokens", "3", "--write"])
    monkeypatch.setattr(cooperation, "SLOWER", 1000.0)                # time is not what is tested
    assert cooperation.main() == 0
    text = (tmp_path / "docs" / "measured" / "cooperation.md").read_text()
    assert text in capsys.readouterr().out and "FAIL" not in text and "Both sides are the same host" in text
    report = json.loads((tmp_path / "docs" / "measured" / "cooperation.json").read_text())["192"]
    assert [way["host_layers"] for way in report["ways"]] == [0, 3, 6] and report["apart"] == 0
    assert report["ways"][1]["device_peak"] <= report["ways"][1]["device_memory"]
    assert report["largest"]["all-device"] < 192 < report["largest"]["cooperation"]
    assert cooperation.verdicts(report | {"apart": 1e-6})[0][1] is False
    monkeypatch.setattr(sys, "argv", ["cooperation.py", "--context", "3"])
    with pytest.raises(SystemExit, match="2"):
        cooperation.main()
