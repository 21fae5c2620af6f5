"""What was measured and what becomes of it: costs hold where they were taken, measuring ends in time, tuning doubts itself."""

import json
import logging
import math

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_models import family_decoder
from test_schedule_choice import PLACES, costs
from tiny_families import FAMILIES, SMALL

from hetero_attn import cli
from hetero_attn.communicator import SoloCommunicator
from hetero_attn.models import schedule_measure, schedule_setup
from hetero_attn.models.config import ModelConfig
from hetero_attn.models.decoder import Decoder
from hetero_attn.models.schedule_setup import conditions, make_schedule, places_of
from hetero_attn.models.schedule_sweep import Row, Sweep, fitted_efficiency
from hetero_attn.parallel import schedule_cost
from hetero_attn.parallel.schedule_choice import WORTH, Auto
from hetero_attn.parallel.schedule_cost import CODED_SUM, SUM, Curve, seen_pairs
from hetero_attn.parallel.schedule_cut import Product, ProductTiles, split_rows
from hetero_attn.parallel.schedule_order import Cut
from hetero_attn.profile import ProfileError, load_profile, save_overlay, shipped_profiles, without_overlay
from hetero_attn.profile_overlap import MEASURED
from hetero_attn.registry import linear_backend
from hetero_attn.testing.rank_threads import on_threads

HOSTS = ["host 0 alpha", "host 1 beta"]


@pytest.fixture
def config_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HETERO_ATTN_CONFIG_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def said():
    lines, logger = [], logging.getLogger("hetero_attn")
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def scheduled(profile, **patched):
    """The Schedule that rank 0 of two gets of a profile, and of each of them."""
    def run(communicator):
        return make_schedule(family_decoder("llama2", communicator), profile)

    outcomes = on_threads(run, 2)
    assert not outcomes[0].error, outcomes[0].traceback
    assert outcomes[0].result.name == outcomes[1].result.name
    return outcomes[0].result


def tuned(values, **sets):
    """A profile with an overlay of two ranks."""
    save_overlay(load_profile("cpu"), values, world_size=2, model="m")
    return load_profile("cpu", world_size=2, model="m", sets=[f"{key}={value}" for key, value in sets.items()])


# ---- costs hold where they were measured ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [None, "dtype bfloat16", "host 1 elsewhere", "codec int8_group32", "communicator Other"])
def test_an_overlay_of_other_conditions_is_left_aside(config_folder, said, other):
    here = on_threads(lambda communicator: conditions(family_decoder("llama2", communicator), "none"), 2)[0].result
    kind = other and other.split()[0]
    there = [other if other and each.startswith(other.rpartition(" ")[0] if kind == "host" else f"{kind} ") else each for each in here]
    assert (there != here) == bool(other)
    found = scheduled(tuned({"overlap.measured": costs().settings(), "overlap.measured_on": there, "overlap.shard_tokens": 4096}))
    if other is None:
        assert found.name == "auto" and found.places.shard_tokens == 4096 and not said
    else:                                                    # two ranks of one host: nothing is measured instead
        assert found.name == "plain" and found.places.shard_tokens == 64
        assert [other in line and "run it again" in line for line in said] == [True]


def test_taking_the_overlay_back_leaves_what_the_file_and_the_command_line_say(config_folder):
    profile = tuned({"overlap.min_tokens": 5, "overlap.parts": 3, "overlap.shard_tokens": 7, "kv_block_size": 3}, **{"overlap.tiles": 6})
    found = without_overlay(profile, "overlap")
    assert (found.overlap.min_tokens, found.overlap.parts, found.overlap.shard_tokens) == (128, None, 64)     # cpu.yaml, and built in
    assert (found.overlap.tiles, found.kv_block_size) == (6, 3) and found.origins["overlap.tiles"] == "--set"


def test_a_sweep_writes_every_key_so_that_nothing_of_an_older_one_stays(config_folder):
    older = {"overlap.parts": 4, "overlap.attention_ctas": 8, "overlap.mlp_ctas": 4, "overlap.min_tokens": 256}
    overlap = tuned(older).overlap
    assert (overlap.parts, overlap.attention_ctas) == (4, 8)
    newer = Sweep(costs(), (), 2, False, {1: 0.1}, None, ("dtype float32", *HOSTS)).settings()
    assert {key for key in older if key not in newer} == set()
    overlap = tuned(newer).overlap
    assert (overlap.parts, overlap.attention_ctas, overlap.mlp_ctas, overlap.min_tokens) == (None, None, None, 128)
    assert overlap.measured_on == ("dtype float32", *HOSTS)


def test_coded_sums_are_measured_where_the_overlay_has_none(config_folder, monkeypatch):
    switched = []
    monkeypatch.setattr(schedule_setup, "codec_routes", lambda communicator, codec: switched.append)
    found = scheduled(tuned({"overlap.measured": costs(coded=None).settings()}, codec="auto"))
    assert found.use_codec is not None and CODED_SUM in found.costs.pieces and switched.count(True) and switched[-1] is False


def test_auto_leaves_the_codec_as_it_is_where_nobody_measured_it():
    said = []
    Auto(PLACES, costs(), use_codec=said.append).cut([512], [512])
    Auto(PLACES, costs(), use_codec=said.append).cut([1], [512])
    assert said == []


def test_nothing_is_measured_where_no_step_is_long_enough(monkeypatch, said):
    monkeypatch.setattr(schedule_setup, "worth_measuring", lambda communicator: True)
    monkeypatch.setattr(schedule_setup, "measure_costs", lambda *_, **__: costs())
    assert scheduled(load_profile("cpu")).name == "auto" and not said
    monkeypatch.setattr(schedule_setup, "measure_costs", lambda *_, **__: pytest.fail("measured for nothing"))
    assert scheduled(load_profile("cpu", sets=["overlap.min_tokens=4096"])).name == "plain"
    assert len(said) == 1 and "overlap.min_tokens is 4096" in said[0] and "steps of up to 512 tokens; raise prefill_chunk" in said[0]
    scheduled(load_profile("cpu", sets=["overlap.min_tokens=4096", "schedule=weave"]))
    assert len(said) == 2 and said[1].startswith("schedule weave cuts no step")


@pytest.mark.parametrize("name", sorted(shipped_profiles()))
def test_a_shipped_profiles_prompts_are_long_enough_to_be_cut(name):
    profile = load_profile(name)
    assert max(profile.overlap.min_tokens, profile.overlap.min_tokens_moe) <= profile.prefill_chunk


# ---- measuring -----------------------------------------------------------------------------------------------------------------------


def small(**keys):
    profile = load_profile("cpu", sets=["kv_block_size=4"])
    config = ModelConfig.from_keys({**SMALL, "model_type": FAMILIES["llama2"][0], **FAMILIES["llama2"][1], **keys})
    decoder = Decoder(config, SoloCommunicator(), dtype=torch.float32, kv_block_size=4, profile=profile)
    decoder.use_backend(linear_backend(profile))
    for name, parameter in decoder.named_parameters():
        parameter.data.fill_(1.0) if "norm" in name else parameter.data.normal_(0.0, 0.1)
    return decoder.eval()


@pytest.mark.parametrize("context", [1, 2, 3, 4, 9])
def test_a_model_of_any_context_is_measured(context):
    found = schedule_measure.measure_costs(small(max_position_embeddings=context), repeats=1)
    assert found.pieces[SUM].points and math.isfinite(found.pair_s) and 0 <= found.efficiency <= 1


@pytest.mark.parametrize("row_s, budget_s", [(1e-6, 5.0), (1e-4, 2.0), (1e-3, 2.0), (1e-2, 2.0)])
def test_measuring_keeps_to_its_budget(monkeypatch, row_s, budget_s):
    """A clock on which every call takes row_s a row: what does not fit is left out, down to one call of everything and one round."""
    spent, rows = [], [0]
    monkeypatch.setattr(schedule_measure, "_hidden", lambda decoder, count, whole=schedule_measure._hidden: rows.append(count) or whole(
        decoder, count))

    class Clock:
        def __init__(self, decoder):
            pass

        def __call__(self, call, warm=False):
            count = next((each.total for each in getattr(call, "args", ()) if isinstance(each, Cut)), None)
            count = 13 * count if count else max(rows)           # a step of two layers has some pieces and sums
            spent.append((1 + warm) * row_s * count)
            return row_s * count

    monkeypatch.setattr(schedule_measure, "_Timer", Clock)
    found = schedule_measure.measure_costs(small(), (8, 16, 32), budget_s=budget_s)
    tried = [count for count, _ in found.pieces[SUM].points]
    least = 3 * 6 * row_s * 8 + 2 * 3 * 13 * row_s * 8
    assert sum(spent) <= 1.001 * max(budget_s, least), "one call of everything and one round, or within the budget"
    assert tried == ([8, 16, 32] if row_s < 1e-3 else tried) and tried[0] == 8 and (row_s < 1e-2 or tried == [8])


# ---- windows -------------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=4), st.integers(1, 12),
       st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_pairs_in_a_window_are_counted(sequences, window, draw):
    counts, lengths = [count for count, _ in sequences], [count + past for count, past in sequences]
    seen = [min(length - count + row + 1, window) for count, length in zip(counts, lengths) for row in range(count)]
    begin, end = sorted(draw.randint(0, len(seen)) for _ in range(2))
    assert seen_pairs(range(begin, end), counts, lengths, window) == sum(seen[begin:end])


def test_layers_with_a_window_cost_what_they_see():
    model = costs(pair_s=1e-6)
    half = costs(pair_s=1e-6, windows=((None, 0.5), (64, 0.5)))
    rows, step = range(512), ([512], [4096])
    assert model.pairs(rows, *step) == seen_pairs(rows, *step)
    assert half.pairs(rows, *step) == 0.5 * seen_pairs(rows, *step) + 0.5 * 64 * 512
    assert schedule_measure.windows_of(small().config) == ()


def test_the_layer_that_is_measured_is_the_middle_one_of_those_that_see_most():
    class Config:
        windows = (None,) * 5
    assert schedule_measure.layer_to_measure(Config) == 2
    Config.windows = (8, None, 8, 8, 8, None)
    assert schedule_measure.layer_to_measure(Config) == 1 and schedule_measure.windows_of(Config) == ((8, 4 / 6), (None, 2 / 6))
    Config.windows = (8, 8, 8)
    assert schedule_measure.layer_to_measure(Config) == 1


def test_costs_of_a_windowed_family_carry_its_windows():
    decoder = family_decoder("gemma2", SoloCommunicator())
    found = schedule_measure.measure_costs(decoder, (4, 8), repeats=1)
    assert dict(found.windows).keys() == set(decoder.config.windows) and sum(share for _, share in found.windows) == pytest.approx(1)


# ---- deciding is quick ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def simulations(monkeypatch):
    calls, whole = [], schedule_cost.simulate
    monkeypatch.setattr(schedule_cost, "simulate", lambda blocks, cut, seconds: calls.append(cut) or whole(blocks, cut, seconds))
    return calls


def test_decoding_is_decided_without_a_simulation(simulations):
    auto = Auto(PLACES, costs(pair_s=1e-7))
    for length in range(100, 200):
        assert auto.cut([1] * 20, [length] * 20).total == 20
    assert not simulations
    said = []
    coding = Auto(PLACES, costs(coded=0.5e-3, pair_s=1e-7), use_codec=said.append)
    for length in range(100, 200):
        coding.cut([1] * 20, [length] * 20)
    assert len(said) == 100 and len(simulations) <= 2


def test_a_prompt_beside_others_that_decode_is_decided_once_for_like_steps(simulations):
    auto = Auto(PLACES, costs(pair_s=1e-7))
    first = auto.cut([512] + [1] * 8, [512] + [1000] * 8)
    assert len({*simulations}) == len(simulations) > 2, "no cut of a step is simulated twice"
    simulations.clear()
    assert auto.cut([512] + [1] * 8, [512] + [1001] * 8) == first and not simulations
    auto.cut([512] + [1] * 8, [4096] + [1001] * 8)
    assert simulations


@given(st.floats(1e-6, 1e-2), st.floats(1e-6, 1e-2), st.floats(0, 1e-5), st.integers(1, 255), st.integers(0, 10000))
@settings(max_examples=60, deadline=None)
def test_a_short_step_is_coded_where_the_costs_say_so(communication, coded, pair_s, total, past):
    said, model = [], costs(1e-3, communication, coded=coded, pair_s=pair_s)
    Auto(PLACES, model, use_codec=said.append).cut([total], [past + total])
    exact, packed = (model.seconds(Cut.at(total), [total], [past + total], coded=each) for each in (False, True))
    assert said == [packed < (1 - WORTH) * exact] or packed == pytest.approx((1 - WORTH) * exact)


# ---- tune --schedule -----------------------------------------------------------------------------------------------------------------


def row(tokens, weave, plain=1.0, promised=0.8, spread=0.0):
    return Row(tokens, {"plain": "", "weave 2": ""}, {"plain": plain, "weave 2": weave}, {"plain": 1.0, "weave 2": 0.9},
               {"plain": 1.0, "weave 2": promised}, spread)


def test_efficiency_is_fitted_to_all_lengths():
    assert fitted_efficiency([row(128, 0.9), row(256, 0.9)], 0.1) == pytest.approx(0.5)
    assert fitted_efficiency([row(128, 1.0), row(256, 0.8)], 0.1) == pytest.approx(0.5)       # one length lost all of it, one nothing
    assert fitted_efficiency([row(128, 0.5)], 0.1) == 1.0 and fitted_efficiency([row(128, 1.5)], 0.1) == 0.0
    assert fitted_efficiency([row(128, 0.5, promised=0.99)], 0.1) == 0.1 and fitted_efficiency([], 0.1) == 0.1


def test_a_sweep_says_what_contradicts_itself():
    def warnings(*rows, **more):
        found = Sweep(costs(**more), rows, 2, False, {1: 0.1})
        assert found.as_json()["warnings"] == found.warnings and found.as_text().count("warning: ") == len(found.warnings)
        return " ".join(found.warnings)

    assert warnings(row(128, 1.0), row(256, 0.9)) == ""
    assert "256 tokens took times that lie 40% apart" in warnings(row(128, 1.0), row(256, 0.9, spread=0.4))
    assert "took 2.00 of what its pieces did" in warnings(row(128, 2.0, plain=2.0))
    assert "lost at a longer one" in warnings(row(128, 0.9), row(256, 1.0))
    assert "auto will hardly cut" in warnings(row(128, 0.9), efficiency=0.0)


@pytest.mark.parametrize("words, expected", [
    (["--set", "memory_budget=3GiB", "--tp", "2"], "leave memory_budget and window out"),
    (["--tp", "9"], "sizes that work"), (["--tp", "2", "--set", "overlap.measured=[sum 3 1.2.3]"], "expected a list of strings"),
])
def test_tune_refuses_before_a_rank_starts(words, expected, monkeypatch, capsys, config_folder):
    monkeypatch.setattr("hetero_attn.parallel.launch.run_ranks", lambda *_, **__: pytest.fail("ranks were started"))
    assert cli.main(["tune", "--schedule", "examples/tiny-llama", *words]) == 2
    assert expected in capsys.readouterr().err


# ---- the profile's values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assignment", [
    "overlap.measured=[sum 3 1.2.3]", "overlap.measured=[product 3 1]", "overlap.measured=[sum 0 1]", "overlap.measured=[sum 3 1e999]",
    "overlap.measured=[sum 3 -1]", "overlap.measured=[sum 3 1, sum 3 2]", "overlap.measured=[sum 3]", "overlap.measured=[sum 3 nan]",
    "overlap.parts=9", "overlap.parts=1", "overlap.efficiency=7", "overlap.efficiency=-1", "overlap.measured_on=[day sunny]",
])
def test_bad_values_are_refused_where_they_are_read(assignment):
    with pytest.raises(ProfileError, match=f"--set.*: {assignment.partition('=')[0]} .*"):
        load_profile("cpu", sets=[assignment])


@given(st.sampled_from(MEASURED), st.integers(1, 10**6), st.floats(1e-12, 1e6) | st.just(0.0))
@settings(max_examples=30, deadline=None)
def test_whatever_is_measured_can_be_read(name, rows, seconds):
    text = schedule_cost.Costs({name: Curve([(rows, seconds)])}).settings()
    assert list(load_profile("cpu", sets=[f"overlap.measured={json.dumps(text)}"]).overlap.measured) == text == yaml.safe_load(
        json.dumps(text))


# ---- waves ---------------------------------------------------------------------------------------------------------------------------


def test_an_expert_sees_its_part_of_the_rows():
    tiles = ProductTiles(128, 256, 4)
    assert Product(256).waves(2048, tiles) == 4 and Product(256, 1 / 4, 8).waves(2048, tiles) == 8 * 1
    assert split_rows(1280, 2, alignment=128, products=[Product(256, 0.01, 8)], tiles=tiles) == [640]      # any part is one wave each
    sets = ["overlap.tile_shape=[16, 16]", "hardware.units=8"]
    found = places_of(family_decoder("mixtral", SoloCommunicator()), load_profile("cpu", sets=sets)).products
    config = family_decoder("mixtral", SoloCommunicator()).config
    assert [(each.share, each.times) for each in found[2:]] == [(config.experts_per_token / config.experts, config.experts)] * 2
    assert [(each.share, each.times) for each in found[:2]] == [(1.0, 1)] * 2


def test_sums_keep_the_units_that_they_run_on_beside_products():
    from hopper_emulated import Node, emulated

    node, sets = Node(2), ["overlap.tile_shape=[16, 16]", "hardware.units=132", "overlap.communication_units=16"]

    def run(communicator, *more):
        return places_of(family_decoder("llama2", communicator), load_profile("cpu", sets=[*sets, *more])).tiles.units

    wrap = lambda base: emulated(base, node, **{"overlap.communication_units": 16})
    assert [outcome.result for outcome in on_threads(run, 2, wrap=wrap)] == [132 - 8] * 2
    more = ("overlap.attention_ctas=2", "overlap.mlp_ctas=4")
    assert [outcome.result for outcome in on_threads(run, 2, wrap=wrap, args=more)] == [132 - 4] * 2
    assert [outcome.result for outcome in on_threads(run, 2)] == [132 - 16] * 2
