"""benchmarks/overlap.py: its arithmetic on made-up times, and one small run of the real thing over shared memory."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from overlap.grid import GRID  # noqa: E402
from overlap.report import Cell, markdown, spent, verdicts  # noqa: E402


def cell(no_comm, plain, weave, auto, counts=(512,)):
    seconds = {"no comm": [no_comm] * 5, "plain": [plain] * 5, "weave 2": [weave] * 5, "auto": [auto] * 5}
    simulated = {"no comm": no_comm, "plain": plain, "weave 2": no_comm}
    return Cell("300 Mbit/s", "m", counts, {name: name for name in seconds}, seconds, simulated)


def test_hidden_is_of_the_shorter_lane():
    assert cell(6, 10, 7, 7).hidden("weave 2") == pytest.approx(0.75) and cell(6, 10, 7, 7).share == pytest.approx(0.4)
    assert cell(2, 10, 9, 9).hidden("weave 2") == pytest.approx(0.5)                   # of 2 s of computing, not of 8 s of transfer
    assert cell(6, 10, 7, 7).reachable("weave 2") == pytest.approx(1)


def test_a_simulation_promises_no_more_than_all():
    """Costs of a disturbed moment may make the parts cheaper than the whole."""
    made = dataclasses.replace(cell(6, 10, 7, 7), simulated={"no comm": 6, "plain": 10, "weave 2": 3})
    assert made.reachable("weave 2") == 1 and "(3.000, 100%)" in markdown("", [made], [], [], [])


def test_the_rounds_of_one_cut_count_together():
    made = cell(6, 10, 7, 8)
    same = dataclasses.replace(made, cuts={**made.cuts, "auto": "weave 2"})
    assert made.time("auto") == 8 and same.time("auto") == same.time("weave 2") == 7.5 and same.time("no comm") == 6


def test_where_a_step_goes():
    one = [["communication", "embed", 0.0, 1.0, 8, 0], ["compute", "inner", 1.0, 3.0, 8, 0], ["communication", "sum", 3.0, 4.5, 8, 0],
           ["compute", "inner", 4.0, 5.0, 8, 1], ["communication", "sum", 5.0, 7.0, 8, 1]]
    idle = [["compute", "inner", 0.0, 2.0, 8, 0]]
    assert spent([idle, one]) == {"computing": 3.0, "waiting": 1.0, "ends": 3.0, "sums": 4.5}
    shown = markdown("", [dataclasses.replace(cell(6, 10, 7, 7), spent=spent([one]))], [], [], [])
    assert "| auto | 6.000 | 3.000 | 1.000 | 3.000 | 4.500 |" in shown


def test_mixed_batches_are_compared_by_tokens_a_second():
    text = markdown("", [cell(6, 10, 7, 8, (1, 1, 98))], [], [], [])
    assert "| 98 + 2 decoding | 10 | 12 | 1.25x |" in text


def test_of_one_linear_the_cost_model_s_tiles_are_judged():
    def one(link, tiles, hidden):
        return {"link": link, "rows": 512, "tiles": tiles, "cut": "256+256", "product_s": 1, "sum_s": 1, "plain_s": 2, "tiled_s": 1.5,
                "hidden": hidden}

    lines = verdicts([], [one("300 Mbit/s", "chosen", 0.8), one("1 Gbit/s", "chosen", 0.6), one("1 Gbit/s", "8", 0.1),
                          one("shared memory", "chosen", -1.0)])
    assert [line.passed for line in lines] == [True, False] and "hides 60%" in lines[1].text


def test_the_grid_has_every_link_and_length_and_each_cell_once():
    assert {each.link for each in GRID} == {"shared memory", "1 Gbit/s", "300 Mbit/s"}
    assert {256, 512, 1024, 2048, 4096} <= {each.tokens for each in GRID}
    assert {each.link for each in GRID if not each.tokens} == {"1 Gbit/s", "300 Mbit/s"}
    assert len({(each.link, each.label, each.tokens) for each in GRID}) == len(GRID)


@pytest.mark.parametrize("made, fails", [
    (cell(6.5, 10, 7, 7), []), (cell(6.5, 10, 7.9, 7.9), ["hides 60%"]), (cell(5, 10, 6.9, 6.9), []),
    (cell(5, 10, 7.2, 7.2), ["hides 56%"]), (cell(6.5, 10, 7, 7.3), ["auto"]),
    (cell(9, 10, 9.5, 9.5), ["largest gain"]), (cell(9, 10, 9.5, 9.5, (1, 512)), []),
])
def test_what_is_asked_fails_where_it_should(made, fails):
    found = [line.text for line in verdicts([made]) if not line.passed]
    assert len(found) == len(fails) and all(words in text for words, text in zip(fails, found)), found


@pytest.mark.ranks
def test_a_small_run_over_shared_memory(tmp_path):
    words = ["--links", "shared memory", "--tokens", "64", "--hidden", "64", "--ffn", "128", "--layers", "2", "--rounds", "1", "--mixed",
             "--tiled", "32", "--trace", "--keep", tmp_path / "kept.json"]
    done = subprocess.run([sys.executable, "benchmarks/overlap.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          timeout=200, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}"})
    assert done.returncode in (0, 1), done.stderr                   # 1: a line of speed, which a model so small does not keep
    assert "| shared memory | 64/128 x 2 float32 | 64 |" in done.stdout and "512 + 4 decoding" in done.stdout
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert len(kept["cells"]) == 2 and "tiled" in kept and kept["cells"][0]["trace"][1]
