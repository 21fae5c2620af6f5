"""The link model: its arithmetic by hand, numbers found again from noisy samples, the choice and its correction, overlay and command."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest
import torch

from hetero_attn import cli
from hetero_attn.collectives import algorithms, listing, tuning
from hetero_attn.collectives.choice import NARROW, NATIVE, WIDE, Choice, Fixed, Route, Table, from_json
from hetero_attn.collectives.cost import CANDIDATES, CodecCost, LinkModel, Load, as_settings, codings, fit, from_settings, load, predict
from hetero_attn.collectives.direct import RUNS_MOST
from hetero_attn.collectives.link import Point, samples_of
from hetero_attn.collectives.tuning import SIZES, Survey, from_profile
from hetero_attn.collectives.wire import AHEAD_BYTES
from hetero_attn.hardware import Link
from hetero_attn.profile import DeviceProfile, ProfileError, load_profile, save_overlay
from hetero_attn.testing.ranks import on_ranks

ROW = 8192 * 4                                       # one row of fp32
SLOW = LinkModel(latency_s=1e-3, byte_s=8 / 300e6, root_byte_s=8 / 300e6, message_s=0.0)     # 1 ms, 300 Mbit/s, messages for nothing


@pytest.fixture(autouse=True)
def own_config(monkeypatch, tmp_path):
    monkeypatch.setenv("HETERO_ATTN_CONFIG_DIR", str(tmp_path / "config"))


# ---- the model


@pytest.mark.parametrize(("algorithm", "milliseconds"), [
    ("one_shot", {2: 1.9, 4: 3.6, 8: 7.1}), ("two_shot", {2: 2.9, 4: 3.3, 8: 3.5}), ("star", {2: 3.7, 4: 7.2, 8: 14.2}),
    ("ring", {2: 2.9, 4: 7.3, 8: 15.5}), ("tree", {2: 3.75, 4: 7.5, 8: 11.2}),
    ("doubling", {2: 1.9, 3: 5.6, 4: 3.7, 8: 5.6}),
])
def test_the_formulas_by_hand(algorithm, milliseconds):
    """TPI-LLM's formulas with a row of 32 KiB on 300 Mbit/s and 1 ms, where a message costs nothing."""
    for world_size, expected in milliseconds.items():
        assert predict(SLOW, "all_reduce", Route(algorithm), world_size, ROW) * 1e3 == pytest.approx(expected, abs=0.06)


def test_messages_and_widening_are_counted():
    costly = LinkModel(0.0, 0.0, 0.0, 1e-3)
    counts = {each: round(predict(costly, "all_reduce", Route(each), 8, ROW) * 1e3) for each in CANDIDATES["all_reduce"]}
    assert counts == {"one_shot": 14, "two_shot": 28, "star": 14, "ring": 28, "tree": 12, "doubling": 6, NATIVE: 28}
    wide, narrow = (load("all_reduce", "ring", 4, 4000, widening=widening).nbytes for widening in (1.0, 2.0))
    assert (wide, narrow) == (6000, 9000)            # half the way at four bytes instead of two
    assert load("all_reduce", "two_shot", 4, 4000) == load("all_reduce", "two_shot", 4, 4000, widening=2.0)


def test_all_ranks_messages_are_counted():
    crowded = LinkModel(0.0, 0.0, 0.0, 0.0, 1e-3)
    counts = {each: round(predict(crowded, "all_reduce", Route(each), 8, ROW) * 1e3) for each in CANDIDATES["all_reduce"]}
    assert counts == {"one_shot": 112, "two_shot": 224, "star": 28, "ring": 224, "tree": 28, "doubling": 48, NATIVE: 224}


def test_long_messages_are_not_received_ahead():
    whole = AHEAD_BYTES * RUNS_MOST                  # one_shot cuts a payload into runs
    short, long = (load("all_reduce", "one_shot", 4, nbytes).hops for nbytes in (whole, whole + 8))
    assert (short, long) == (1, 2)
    assert load("all_reduce", "star", 4, AHEAD_BYTES).hops == 2 and load("all_reduce", "star", 4, AHEAD_BYTES + 4).hops == 3
    assert load("all_reduce", "two_shot", 4, 4 * AHEAD_BYTES).hops == 2 and load("all_reduce", "two_shot", 4, 4 * AHEAD_BYTES + 4).hops == 3


def test_a_root_sees_to_messages_while_bytes_pass():
    """Of its two the longer counts; where all send at once both do."""
    link = LinkModel(1e-3, 8 / 300e6, 8 / 300e6, 2e-4)
    for nbytes in (1 << 8, 1 << 20):
        found = load("all_reduce", "star", 8, nbytes)
        parts = found.root_bytes * link.root_byte_s, found.messages * link.message_s
        assert link.seconds(found) == pytest.approx(found.hops * 1e-3 + max(parts))
    both = load("all_reduce", "one_shot", 8, 1 << 12)
    assert link.seconds(both) == pytest.approx(1e-3 + both.nbytes * link.byte_s + both.messages * 2e-4)


def test_every_algorithm_has_a_load_for_every_operation():
    for operation in algorithms.OPERATIONS:
        for algorithm in (*algorithms.NAMES, NATIVE):
            found = load(operation, algorithm, 5, 1000)
            assert found.hops >= 1 and found.messages >= 2 and found.nbytes + found.root_bytes > 0
            assert load(operation, algorithm, 1, 1000) == Load()


def test_short_messages_feel_what_a_codec_costs_each_time():
    """On a fast link a row is not worth packing and a prefill is; on a slow one both are."""
    fast, codec = LinkModel(1e-5, 8 / 10e9, 8 / 10e9, 1e-5), CodecCost(1 / 8, 1e-11, 2e-5)
    for link, nbytes, packed in ((fast, 1 << 12, False), (fast, 1 << 23, True), (SLOW, 1 << 14, True)):
        plain = predict(link, "all_reduce", Route("one_shot"), 4, nbytes)
        assert (predict(link, "all_reduce", Route("one_shot", "int4"), 4, nbytes, codec=codec) < plain) == packed
    assert [codings(each, 4) for each in algorithms.CODED] == [5, 13, 7]


def test_a_codec_shrinks_bytes_and_costs_time():
    int4 = CodecCost(ratio=1 / 8, byte_s=1e-9)
    plain = predict(SLOW, "all_reduce", Route("two_shot"), 4, 1 << 20)
    coded = predict(SLOW, "all_reduce", Route("two_shot", "int4"), 4, 1 << 20, codec=int4)
    assert coded < plain / 3
    free = predict(SLOW, "all_reduce", Route("two_shot", "int4"), 4, 1 << 20, codec=CodecCost(1 / 8, 0.0))
    assert coded - free == pytest.approx(3.25 * (1 << 20) * 1e-9)          # encode all, decode N quarters, and the sum's quarter anew
    with pytest.raises(ValueError, match="CodecCost"):
        predict(SLOW, "all_reduce", Route("two_shot", "int4"), 4, 100)


# ---- the fit


@pytest.mark.parametrize("planted", [
    LinkModel(1e-3, 8 / 300e6, 8 / 300e6, 1e-4), LinkModel(5e-3, 8 / 300e6, 8 / 100e6, 3e-4), LinkModel(5e-5, 8 / 10e9, 8 / 10e9, 2e-5),
    LinkModel(1e-3, 8 / 300e6, 8 / 300e6, 1e-4, 1.5e-5),
])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_planted_link_is_found_again(planted, world_size):
    """From what a survey measures, with a tenth of noise and one sample three times too slow: points not fitted to within 30 %."""
    noise = random.Random(world_size)
    calibrated = [load("all_reduce", algorithm, world_size, nbytes) for algorithm, nbytes in tuning.CALIBRATED]
    loads = [*(each for each, _ in samples_of(world_size, [1.0], [(1 << 16, 1.0), (1 << 18, 1.0)], [])), *calibrated]
    samples = [(each, planted.seconds(each) * noise.uniform(0.9, 1.1)) for each in loads]
    samples[3] = samples[3][0], samples[3][1] * 3
    found = fit(samples)
    for algorithm in algorithms.NAMES:
        for nbytes in (1 << 12, ROW, 1 << 16, 1 << 20):
            truth = predict(planted, "all_reduce", Route(algorithm), world_size, nbytes)
            assert predict(found, "all_reduce", Route(algorithm), world_size, nbytes) == pytest.approx(truth, rel=0.3)


def test_a_fit_is_never_negative_and_needs_samples():
    found = fit([(Load(hops=1, messages=2), 1e-3), (Load(hops=2, messages=4), 1e-3), (Load(hops=1, nbytes=1e6), 1e-3)])
    assert min(found.latency_s, found.byte_s, found.root_byte_s, found.message_s) >= 0
    with pytest.raises(ValueError, match="samples"):
        fit([])


def test_settings_round_trip():
    again = from_settings(**as_settings(LinkModel(1.23e-3, 8 / 3e8, 8 / 2e8, 0.0)))
    assert (again.latency_s, again.byte_s, again.root_byte_s) == pytest.approx((1.23e-3, 8 / 3e8, 8 / 2e8))
    assert from_settings(1.0, 0.1, 0.0, None, None).byte_s == 0.0


# ---- the choice


def measured(operation, nbytes, algorithm, milliseconds):
    return Point(operation, nbytes, Route(algorithm), milliseconds * 1e-3)


def test_small_messages_take_few_hops_and_large_ones_few_bytes():
    found = Survey(8, tuple("abcdefgh"), LinkModel(5e-3, 8 / 300e6, 8 / 300e6, 1e-4))
    assert found.best("all_reduce", 1 << 10).algorithm == "one_shot"
    assert found.best("all_reduce", 1 << 20).algorithm == "two_shot"
    assert {found.best("all_gather", size).algorithm for size in SIZES} == {"one_shot"}
    dear = Survey(8, tuple("abcdefgh"), LinkModel(1e-4, 8 / 1e9, 8 / 1e9, 2e-3))            # where a message costs most of all
    assert dear.best("all_reduce", 1 << 8).algorithm == "doubling"


def test_what_was_timed_corrects_what_was_predicted():
    before = Survey(4, tuple("abcd"), SLOW)
    assert before.best("all_reduce", 1 << 12).algorithm == "one_shot"
    slow_one_shot = measured("all_reduce", 1 << 12, "one_shot", 9.0)
    timed = (slow_one_shot, measured("all_reduce", 1 << 12, "two_shot", 2.2))
    after = Survey(4, tuple("abcd"), SLOW, timed)
    assert after.best("all_reduce", 1 << 12).algorithm == "two_shot"
    assert after.expected("all_reduce", Route("one_shot"), 1 << 12) == pytest.approx(9e-3)
    # Beside the measured size the same factor holds, between two of them the geometric mean of theirs.
    factor = 9e-3 / before.predicted("all_reduce", Route("one_shot"), 1 << 12)
    assert after.correction("all_reduce", Route("one_shot"), 1 << 14) == pytest.approx(factor)
    exact = Point("all_reduce", 1 << 16, Route("one_shot"), before.predicted("all_reduce", Route("one_shot"), 1 << 16))
    between = Survey(4, tuple("abcd"), SLOW, (slow_one_shot, exact))
    assert between.correction("all_reduce", Route("one_shot"), 1 << 14) == pytest.approx(math.sqrt(factor))


def test_nothing_is_chosen_by_being_unmeasured():
    """Every run was twice as slow as predicted: an algorithm that was never run is taken to be so too."""
    plain = Survey(4, tuple("abcd"), SLOW)
    routes = Route("one_shot"), Route("star")
    points = tuple(Point("all_reduce", 1 << 12, route, 2 * plain.predicted("all_reduce", route, 1 << 12)) for route in routes)
    assert Survey(4, tuple("abcd"), SLOW, points).best("all_reduce", 1 << 12) == plain.best("all_reduce", 1 << 12)


def test_torch_distributed_is_a_candidate_where_it_was_timed():
    assert Route(NATIVE) not in Survey(4, tuple("abcd"), SLOW).candidates("all_reduce")
    fast = Survey(4, tuple("abcd"), SLOW, (measured("all_reduce", 1 << 12, NATIVE, 0.1),))
    assert fast.best("all_reduce", 1 << 12) == Route(NATIVE) and Route(NATIVE) not in fast.candidates("all_reduce", NARROW)


def test_a_profile_narrows_the_choice():
    found = Survey(4, tuple("abcd"), SLOW, codecs={"int8_group32": CodecCost(0.27, 1e-10), "int4_group32": CodecCost(0.14, 1e-10)})
    assert {found.best("all_reduce", size, algorithm="ring").algorithm for size in SIZES} == {"ring"}
    assert {found.best("all_reduce", size).codec for size in SIZES} == {"none"}             # lossy only when asked
    named = {found.best("all_reduce", size, codec="int8_group32") for size in SIZES}
    assert {route.codec for route in named} == {"int8_group32"} and {route.algorithm for route in named} <= set(algorithms.CODED)
    assert found.best("all_reduce", 1 << 20, codec="auto").codec == "int4_group32"
    assert found.best("all_gather", 1 << 20, codec="int8_group32").codec == "none"


def test_the_table_takes_the_nearest_size():
    table = Table({("all_reduce", WIDE): {256: Route("star"), 1024: Route("one_shot"), 65536: Route("two_shot")}})

    def pick(nbytes, dtype=torch.float32, operation="all_reduce"):
        return table.pick(operation, nbytes, dtype).algorithm

    assert [pick(each) for each in (0, 1, 300, 511, 1024, 5000, 12_000, 65536, 1 << 30)] == [
        "star", "star", "star", "star", "one_shot", "one_shot", "two_shot", "two_shot", "two_shot"]
    assert pick(1024, torch.bfloat16) == NATIVE and pick(1024, operation="broadcast") == NATIVE


@pytest.mark.parametrize("choice", [Choice(), Fixed(Route("ring")), Survey(3, ("a", "b", "c"), SLOW).table()])
def test_a_choice_travels_as_json(choice):
    again = from_json(choice.to_json())
    assert type(again) is type(choice) and again.to_json() == choice.to_json()
    for size in (1, 1000, 1 << 15, 1 << 26):
        for dtype in (torch.float32, torch.float16):
            assert again.pick("all_reduce", size, dtype) == choice.pick("all_reduce", size, dtype)


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="butterfly"):
        Fixed(Route("butterfly"))
    with pytest.raises(ValueError, match="kind"):
        from_json('{"kind": "guess"}')
    with pytest.raises(ValueError, match="scan"):
        Table({("scan", WIDE): {256: Route("star")}})


# ---- the overlay


def test_a_survey_survives_the_overlay():
    points = (measured("all_reduce", 1 << 13, "one_shot", 3.21), measured("all_gather", 1 << 20, "ring", 87.0))
    found = Survey(3, ("alpha", "beta", "beta"), LinkModel(1.1e-3, 8 / 299e6, 8 / 150e6, 1.3e-4), points)
    save_overlay(load_profile("cpu"), found.settings(), world_size=3)
    again = from_profile(load_profile("cpu", world_size=3).link, 3)
    assert again.hosts == found.hosts and again.points == points
    assert again.table().to_json() == found.table().to_json() and listing.as_text(again) == listing.as_text(found)
    assert from_profile(load_profile("cpu", world_size=4).link, 4) is None                  # of another number of ranks


def test_a_damaged_measurement_is_refused():
    with pytest.raises(ProfileError, match="measured"):
        save_overlay(load_profile("cpu"), {"link.measured": ["all_reduce lots one_shot none 3"]}, world_size=2)
    with pytest.raises(ProfileError, match="codec is int8_group32 beside algorithm ring"):
        load_profile("cpu", sets=["algorithm=ring", "codec=int8_group32"])


# ---- between real ranks


def in_ranks(communicator, hosts):
    """A survey, and what settle() makes of several profiles; every rank's table and the bits of a sum by it."""
    found = tuning.survey(communicator, hosts)
    assert isinstance(communicator.choice, Choice) and communicator.choice.pick("all_reduce", 1, torch.float32).algorithm == NATIVE
    settled = []
    plain = DeviceProfile(name="any", device="cpu")
    asked = (("auto", "none", True), ("auto", "none", False), ("star", "none", True), ("auto", "int8_group32", True),
             ("auto", "auto", True), ("auto", "int4_group32", False))
    for algorithm, codec, worth_measuring in asked:
        # Other ranks' profiles are ignored: all follow rank 0.
        profile = plain if communicator.rank else DeviceProfile(name="mine", device="cpu", algorithm=algorithm, codec=codec)
        settled.append(tuning.settle(communicator, profile, hosts, worth_measuring=worth_measuring))
    damaged = Link(latency_ms=1.0, hosts=tuple(f"{rank} {host}" for rank, host in enumerate(hosts)), measured=("scan 8 star none 3",))
    try:                                             # rank 0's overlay alone is damaged: all are told, none waits
        tuning.settle(communicator, plain if communicator.rank else dataclasses.replace(plain, link=damaged), hosts, worth_measuring=False)
        settled.append((Choice(), "nothing was said"))
    except ValueError as error:
        settled.append((Choice(), str(error)))
    communicator.choice = settled[0][0]
    communicator.all_reduce(torch.ones(5000))
    timed = {(point.operation, point.route.algorithm) for point in found.points}
    numbers = as_settings(found.link), tuning.gather_hosts(communicator)
    return [choice.to_json() for choice, _ in settled], [source for _, source in settled], sorted(timed), numbers


@pytest.mark.ranks
def test_all_ranks_settle_on_rank_0s_choice():
    hosts = ["alpha", "beta", "gamma"]
    outcomes = on_ranks(in_ranks, (hosts,), 3)
    assert not any(outcome.error for outcome in outcomes), outcomes
    tables, sources, timed, (numbers, found_hosts) = outcomes[0].result
    assert all(outcome.result[0] == tables for outcome in outcomes)
    assert [json.loads(text)["kind"] for text in tables] == ["table", NATIVE, "fixed", "table", "table", "fixed", NATIVE]
    assert all("link.measured holds 'scan 8 star none 3'" in outcome.result[1][-1] for outcome in outcomes)
    named = from_json(tables[3])
    assert [named.pick(each, ROW, torch.float32).codec for each in ("all_reduce", "all_gather")] == ["int8_group32", "none"]
    assert from_json(tables[5]).pick("all_reduce", ROW, torch.bfloat16) == Route("two_shot", "int4_group32")
    assert sources[0].startswith("measured at start-up in ") and "one host" in sources[1] and "names it" in sources[2]
    assert {("all_reduce", each) for each in ("one_shot", "two_shot", "star", "ring")} <= set(timed)
    assert numbers["latency_ms"] + numbers["message_ms"] + numbers["crowd_ms"] > 0 and len(set(found_hosts)) == 1


@pytest.mark.ranks
def test_tune_measures_writes_and_shows(capsys):
    assert cli.main(["tune", "--profile", "cpu", "--tp", "2", "--show"]) == 2
    assert "run hetero-attn tune --tp 2" in capsys.readouterr().err
    assert cli.main(["tune", "--profile", "cpu", "--tp", "2"]) == 0
    profile = load_profile("cpu", world_size=2)
    found = from_profile(profile.link, 2)
    assert found is not None and "overlay" in profile.origins["link.latency_ms"] and len(found.points) > 10
    assert cli.main(["tune", "--profile", "cpu", "--tp", "2", "--show"]) == 0
    shown = capsys.readouterr().out
    assert shown.rstrip() == listing.as_text(found).rstrip()
    for line in (line for line in shown.splitlines() if line.split(" ")[1:2] in (["B"], ["KiB"], ["MiB"])):
        assert line.count(">") == 1, "a choice in every row"
    assert cli.main(["tune", "--profile", "cpu", "--tp", "2", "--show", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {(row["operation"], row["dtypes"], row["bytes"]): row for row in report["rows"]}
    assert rows["all_reduce", WIDE, 256]["measured_ms"][f"{NATIVE}/none"] > 0 and len(rows) == 2 * len(SIZES) * len(algorithms.OPERATIONS)


@pytest.mark.parametrize(("words", "said"), [([], "give --tp N"), (["--tp", "1"], "at least 2 ranks"), (["--tp", "0"], "at least 2 ranks")])
def test_tune_needs_ranks(capsys, words, said):
    assert cli.main(["tune", "--profile", "cpu", *words]) == 2
    assert said in capsys.readouterr().err
