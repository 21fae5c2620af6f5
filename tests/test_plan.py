"""Unlike devices share a model in proportion to what they can do, and the plan says what that takes before anything runs."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="transformers writes the checkpoints these tests read")

from tiny_checkpoint import write_checkpoint
from tiny_families import make_model

from hetero_attn.cli import main
from hetero_attn.communicator import SoloCommunicator
from hetero_attn.models.config import ModelError
from hetero_attn.models.export import export
from hetero_attn.models.generate import generate
from hetero_attn.models.hosts import Host, Hosts, read_hosts
from hetero_attn.models.load import load_model
from hetero_attn.models.planning import plan_model, split_for
from hetero_attn.models.sampling import SamplingParams
from hetero_attn.parallel.launch import run_ranks
from hetero_attn.parallel.partition import Speed, proportional, shares, uneven
from hetero_attn.profile import load_profile

RATES = "hardware.memory_gbps: 20, hardware.memory_gib: 8"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=3)


@given(st.integers(0, 500), st.lists(st.floats(0.01, 100), min_size=1, max_size=9), st.sampled_from([1, 8, 64]))
@settings(max_examples=300, deadline=None)
def test_proportional_counts_add_up_and_follow_the_weights(total, weights, grain):
    counts = proportional(total, weights, grain=grain)
    assert sum(counts) == total and min(counts) >= 0
    room = grain if total // grain >= 4 * len(weights) else 1
    for count, weight in zip(counts, weights):
        assert abs(count - total * weight / sum(weights)) < 2 * room


@given(st.lists(st.floats(0.05, 20), min_size=1, max_size=8), st.sampled_from([(8, 8), (32, 8), (12, 4), (9, 1)]),
       st.sampled_from(["master", "sharded"]))
@settings(max_examples=300, deadline=None)
def test_any_uneven_split_covers_the_model_once(weights, heads, vocabulary):
    q_heads, kv_heads = heads
    parts = uneven(weights, q_heads=q_heads, kv_heads=kv_heads, ffn=688, vocab=1000, vocabulary=vocabulary)
    for name, total in (("q_heads", q_heads), ("ffn", 688), ("vocab", 1000)):
        assert [place for part in parts for place in getattr(part, name)] == list(range(total))
    for part in parts:
        assert len(part.q_heads) % len(part.kv_heads) == 0 and len(part.q_heads) >= 1


def test_shares_make_all_ranks_take_the_same_time():
    speeds = [Speed(20e9, 1e9, 0.5e9), Speed(10e9, 8e9), Speed(40e9, 2e9, 2e9)]
    total = 9e9
    found = shares(total, speeds)
    times = [speed.seconds(share * total) for speed, share in zip(speeds, found)]
    assert math.isclose(sum(found), 1) and max(times) < min(times) * 1.001
    assert shares(1e9, [Speed(10e9, 8e9), Speed(30e9, 8e9)]) == pytest.approx([0.25, 0.75])
    # one that would hold more than it has room for gets what fits, the others the rest
    assert shares(4e9, [Speed(100e9, 1e9), Speed(1e9, 8e9)]) == pytest.approx([0.25, 0.75])
    with pytest.raises(ValueError, match=r"take 9\.31 GiB, the ranks together have room for 3\.73 GiB"):
        shares(10e9, [Speed(1e9, 2e9), Speed(1e9, 2e9)])


def hosts_file(tmp_path, text):
    file = tmp_path / "hosts.yaml"
    file.write_text(text)
    return file


UNLIKE = f"""
link: {{latency_ms: 1, bandwidth_mbps: 300}}
ranks:
  - {{profile: cpu, memory: 2GiB, set: {{{RATES}}}}}
  - {{profile: cpu, memory: 1GiB, set: {{hardware.memory_gbps: 60}}}}
"""


@pytest.mark.ranks
def test_unlike_hosts_run_as_they_were_cut(tmp_path):
    """Cut for hosts of unlike speed, run by real ranks: the text of one rank."""
    folder = tmp_path / "model"
    make_model("llama-biases-linear").save_pretrained(folder)
    partitions = split_for(folder, read_hosts(hosts_file(tmp_path, UNLIKE)), "sharded")
    assert len(partitions[0].ffn) < len(partitions[1].ffn) and partitions[0].vocab_counts
    export(folder, tmp_path / "parts", 2, vocabulary="sharded", partitions=partitions)
    expected = tokens_of(folder, {"communicator": SoloCommunicator()})
    for options in ({}, {"window": 2}):
        assert run_ranks(tokens_of, (tmp_path / "parts", options), 2, threads=1)[0] == expected
    assert run_ranks(tokens_of, (folder, {"partitions": partitions, "vocabulary": "sharded"}), 2, threads=1)[0] == expected


def tokens_of(folder, options):
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    return [list(each.token_ids) for each in generate(load_model(folder, "cpu", **options), [[3, 4, 5]], params)]


def test_a_plan_adds_up_to_the_checkpoint(folder, tmp_path):
    plan = plan_model(folder, read_hosts(hosts_file(tmp_path, UNLIKE)), context=64, vocabulary="master")
    whole = (folder / "model.safetensors").stat().st_size
    held = sum(rank.weights for rank in plan.ranks)
    assert 0.9 * whole < held < 1.1 * whole and not any(rank.streamed for rank in plan.ranks)
    assert plan.context == 64 and plan.largest_context == 128 and plan.reduce_s > 0.005
    assert any("tensor parallelism is the wrong choice here" in line for line in plan.remarks)      # 1 ms a sum for a model of 100 us


def test_memory_that_does_not_do_is_refused_with_what_does(folder, tmp_path):
    small = UNLIKE.replace("2GiB", "100MiB").replace("1GiB", "100MiB")
    with pytest.raises(ModelError, match="none streams from a disk; add ranks or memory, or give a disk's rate"):
        plan_model(folder, read_hosts(hosts_file(tmp_path, small)))
    streams = small.replace("hardware.memory_gbps:", "hardware.disk_gbps: 1, hardware.memory_gbps:")
    with pytest.raises(ModelError, match="the least that works is"):
        plan_model(folder, read_hosts(hosts_file(tmp_path, streams)))


def test_ranks_of_one_host_share_its_disk(folder, tmp_path):
    """As much from the disk, at the same time: with a host of its own each rank is twice as quick."""
    write_checkpoint(tmp_path, dtype=torch.bfloat16, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, vocab_size=1024,
                     num_attention_heads=16, num_key_value_heads=8, head_dim=64)
    rank = f"{{profile: cpu, memory: 330MiB, set: {{{RATES}, hardware.disk_gbps: 0.5}}%s}}"
    plans = [plan_model(tmp_path, read_hosts(hosts_file(tmp_path, f"ranks: [{rank % one}, {rank % other}]")), context=16)
             for one, other in ((", host: a", ", host: a"), (", host: a", ", host: b"))]
    shared, own = ([rank.disk_s for rank in plan.ranks] for plan in plans)
    assert min(own) > 0 and shared == pytest.approx([2 * each for each in own])
    says = "ranks 0, 1 are on one host and share its disk's 0.5 GB/s"
    assert [any(says in line for line in plan.remarks) for plan in plans] == [True, False]


@pytest.mark.parametrize("text, says", [
    ("ranks: 3", "ranks is 3, expected a list"), ("rank: []", "unknown key 'rank'; did you mean ranks?"), ("- 1", "expected keys"),
    ("ranks: [{profil: cpu}]", r"ranks\[0\] has an unknown key 'profil'; did you mean profile"), ("ranks: [{}]", "profile is None"),
    ("ranks: [{profile: cpu, memory: 3}]", "is no size"), ("ranks: [{profile: cpu, device: cuda}]", "profile 'cpu' is for cpu"),
    ("ranks: [{profile: cpu}]\nlink: {latency_ms: fast}", "link.latency_ms is 'fast', expected a number"), ("a: [", "is no YAML"),
    ("ranks: [{profile: cpu}]\nlink: {bandwidth_mbps: 3}", "link has no latency_ms"),
])
def test_a_wrong_hosts_file_is_one_line(tmp_path, text, says):
    with pytest.raises(ModelError, match=says) as caught:
        read_hosts(hosts_file(tmp_path, text))
    assert "hosts.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_prints_the_plan(folder, tmp_path, capsys):
    wanted = ["plan", str(folder), "--profile", "edge", "--tp", "2", "--memory", "1GiB", "--link", "1ms,300Mbit", "--context", "100"]
    assert main(wanted) == 2
    assert "does not say hardware.memory_gbps (memory bandwidth, GB/s)" in capsys.readouterr().err
    wanted += ["--set", "hardware.memory_gbps=20"]
    assert main(wanted) == 0
    text = capsys.readouterr().out
    assert "largest that fits is 128" in text and "one rank alone" in text
    assert main([*wanted, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [rank["q_heads"] for rank in found["ranks"]] in ([[0, 3], [3, 6]],) and found["algorithm"]
    assert found["ranks"][1]["vocab"] == [0, 0] and found["token_s"] > 0
    assert main(["plan", str(folder), "--hosts", str(hosts_file(tmp_path, UNLIKE)), "--tp", "2"]) == 2
    assert "with --hosts it stands in the file" in capsys.readouterr().err
    assert main([*wanted, "--link", "quick"]) == 2 and "expected latency and rate" in capsys.readouterr().err


def test_the_prediction_of_memory_is_what_a_rank_has(folder, tmp_path):
    plan = plan_model(folder, read_hosts(hosts_file(tmp_path, UNLIKE)), context=64, vocabulary="sharded")
    for rank in plan.ranks:
        from hetero_attn.communicator import Communicator
        from hetero_attn.models.config import ModelConfig
        from hetero_attn.models.decoder import Decoder

        decoder = Decoder(ModelConfig.from_dir(folder), Communicator(rank.partition.rank, 2), dtype=torch.float32, vocabulary="sharded",
                          partition=rank.partition)
        assert sum(parameter.nbytes for parameter in decoder.parameters()) == rank.weights


def test_a_plan_for_the_processors_of_this_host_needs_no_numbers(folder, capsys, monkeypatch):
    """`plan MODEL --tp 2` as the README has it: the ranks share the memory that is available, and its bandwidth."""
    monkeypatch.setattr("hetero_attn.models.placing.available_bytes", lambda: 8 << 30)
    token, alone = {}, {}
    for ranks in (1, 2):
        assert main(["plan", str(folder), "--tp", str(ranks), "--json", "--set", "hardware.memory_gbps=20"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [each["memory"] for each in found["ranks"]] == [(8 << 30) // ranks] * ranks
        assert "this host's, which has 8.00 GiB available now" in found["remarks"][0]
        token[ranks], alone[ranks] = found["token_s"], found["alone_s"]
    assert token[1] == alone[1] == alone[2] and token[2] > 0.9 * token[1]                # two ranks have no more of it than one
    monkeypatch.setattr("hetero_attn.models.placing.available_bytes", lambda: None)
    assert main(["plan", str(folder), "--tp", "2"]) == 2 and "hardware.memory_gib" in capsys.readouterr().err


SHAPES = Path(__file__).parents[1] / "examples" / "shapes"
WEIGHTS_GIB = {"llama-2-7b": 12.6, "llama-2-70b": 128.5, "llama-3.1-8b": 15.0, "pangu-38b": 71.0}        # 16 bits each


@pytest.mark.parametrize("shape", sorted(WEIGHTS_GIB))
def test_a_model_that_nobody_has_fetched_can_be_planned(shape):
    hosts = Hosts((Host(load_profile("ascend910b"), "npu"),) * 8)
    plan = plan_model(SHAPES / shape, hosts)
    assert sum(rank.weights for rank in plan.ranks) / 2**30 == pytest.approx(WEIGHTS_GIB[shape], rel=0.05)
    assert sorted(folder.name for folder in SHAPES.iterdir()) == sorted(WEIGHTS_GIB)


def test_what_the_communicator_keeps_of_the_device_is_counted(folder, capsys):
    """Symmetric memory, on one host and from two ranks on, by rank 0's sizes; whose it is is a line of its own."""
    def planned(*names, **changes):
        profile = load_profile("h100", sets=[f"{name}={value}" for name, value in changes.items()])
        return plan_model(folder, Hosts(tuple(Host(profile, "cuda", None, name) for name in names)), context=64)

    plain, without = planned("", ""), planned("", "", communicators="[distributed]")
    assert plain.communicator == "hopper" and without.communicator == ""
    kept = plain.ranks[0].communicator
    assert 640 << 20 < kept < 642 << 20 and not without.ranks[0].communicator
    assert [a.total - b.total for a, b in zip(plain.ranks, without.ranks)] == [kept, kept]
    for rank in plain.ranks:
        assert rank.total == rank.process + kept + rank.held + rank.window + rank.cache + rank.activations
    small = planned("", "", symmetric_room_bytes=1 << 20, symmetric_heap_bytes=2 << 20).ranks[0].communicator
    assert kept - small == (127 << 20) + (510 << 20)
    assert plain.cooperation.largest_on_devices < without.cooperation.largest_on_devices
    for other in (planned(""), planned("a", "b"), planned("", "", codec="int8_group32")):
        assert not other.communicator and not any(rank.communicator for rank in other.ranks)
    assert main(["plan", str(folder), "--profile", "h100", "--tp", "2"]) == 0
    assert "each total holds 641 MiB that the communicator of hopper keeps of the device" in capsys.readouterr().out
    assert main(["plan", str(folder), "--profile", "h100", "--tp", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["communicator"] == "hopper" and [rank["communicator"] for rank in found["ranks"]] == [kept, kept]


def test_ranks_of_one_host_share_what_it_has(folder, capsys):
    """Memory, its rate and the disk: as much a rank whether the host holds some of the ranks or all."""
    found = {}
    for each in (1, 2, 4):
        assert main(["plan", str(folder), "--profile", "edge", "--tp", "4", "--per-host", str(each), "--json", "--set",
                     "hardware.memory_gib=4", "--set", "hardware.memory_gbps=20", "--set", "hardware.disk_gbps=0.5"]) == 0
        found[each] = json.loads(capsys.readouterr().out)
    assert [found[each]["ranks"][0]["memory"] >> 20 for each in (1, 2, 4)] == [4096, 2048, 1024]
    times = [found[each]["ranks"][0]["compute_s"] for each in (1, 2, 4)]
    assert times[1] == pytest.approx(2 * times[0]) and times[2] == pytest.approx(4 * times[0])
