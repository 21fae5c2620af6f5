"""FastAttention's L_GPU and L_CPU, and the plan of its claim: 256K tokens of a 38B model on eight V100s."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_attn.cli import main
from hetero_attn.models.config import ModelError
from hetero_attn.models.hosts import read_hosts
from hetero_attn.models.planning import plan_model
from hetero_attn.parallel.placement import BUFFERS, DeviceMemoryError, Placement, most_layer_bytes, parse, place, ranges, spread
from hetero_attn.profile import ProfileError, load_profile

ROOT = Path(__file__).parents[1]
PANGU = ROOT / "examples" / "shapes" / "pangu-38b"


@given(st.integers(1, 100), st.data())
def test_host_layers_are_spread_evenly_and_late(layers, data):
    count = data.draw(st.integers(0, layers))
    host = spread(layers, count)
    assert len(set(host)) == count and sorted(host) == list(host) and all(0 <= each < layers for each in host)
    gaps = [after - before for before, after in zip((-1, *host), host)]
    assert not count or max(gaps) - min(gaps) <= 1
    assert not count or host[-1] == layers - 1


@given(st.integers(1, 60), st.integers(1, 1000), st.integers(-50, 60_000))
@settings(max_examples=300)
def test_as_many_layers_on_the_device_as_the_formula_gives(layers, layer_bytes, room):
    """L_device = floor(room / b), less the buffers where not all fit."""
    fit = max(room, 0) // layer_bytes
    expected = layers if fit >= layers else fit - min(BUFFERS, layers)
    if expected < 0:
        with pytest.raises(DeviceMemoryError, match="needs at least"):
            place(layers, layer_bytes, room)
        assert layer_bytes > (most_layer_bytes(layers, room) or 0)
        return
    found = place(layers, layer_bytes, room)
    assert len(found.device) == min(expected, layers) and found.device_bytes <= max(room, 0)
    assert set(found.device) | set(found.host) == set(range(layers)) and found.host_bytes == len(found.host) * layer_bytes
    most = most_layer_bytes(layers, room)
    assert most >= layer_bytes
    place(layers, most, room)
    with pytest.raises(DeviceMemoryError):
        place(layers, most + 1, room)


def test_what_is_asked_for_is_done_or_refused():
    assert place(8, 10, None) == place(8, 10, 80) == Placement(8, (), 10)
    assert len(place(8, 10, 100, 3).host) == 3                                     # by number even where all would fit
    with pytest.raises(DeviceMemoryError, match=r"at least 80 B of the device with placement all-device, 79 B are left"):
        place(8, 10, 79, "all-device")
    with pytest.raises(DeviceMemoryError, match=r"at least 70 B of the device with placement 3-host-layers"):
        place(8, 10, 69, 3)
    with pytest.raises(DeviceMemoryError, match="8 of 8 layers' KV on the host take 80 B, the host has 79 B"):
        place(8, 10, 20, host_room=79)
    with pytest.raises(DeviceMemoryError, match="8 of 8 layers' KV on the host take 128 B, the host has 100 B"):
        place(8, 10, 20, host_room=100, host_layer_bytes=16)
    with pytest.raises(ValueError, match="9 layers on the host, the model has 8"):
        place(8, 10, None, 9)
    assert most_layer_bytes(8, 80) == 40 and most_layer_bytes(8, 80, "all-device") == 10 and most_layer_bytes(8, 80, host_room=40) == 11
    assert most_layer_bytes(8, None) is None and most_layer_bytes(8, None, 4, host_room=40) == 10
    assert str(place(6, 1, 5)) == "layers 0, 2, 4 on device, 1, 3, 5 on host"
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8" and str(Placement(4)) == "layers 0-3 on device"


@pytest.mark.parametrize("text, means", [("auto", "auto"), ("all-device", "all-device"), ("20-host-layers", 20), (" 3 ", 3), ("0", 0)])
def test_placements_as_they_are_spelled(text, means):
    assert parse(text) == means


@pytest.mark.parametrize("written, means", [("3", 3), ("3-host-layers", 3), ("0", 0), ("'20'", 20), ("all-device", "all-device")])
def test_a_profile_takes_a_number_as_the_command_line_does(written, means, tmp_path):
    """In a file, by --set, and from Python, where an integer is stored as the spelling that parse() has."""
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: cpu\nplacement: {written}\n")
    for profile in (load_profile(file), load_profile("cpu", sets=[f"placement={written}"])):
        assert parse(profile.placement) == means
    if isinstance(means, int):
        assert replace(load_profile("cpu"), placement=means).placement == f"{means}-host-layers"


@pytest.mark.parametrize("written", ["-1", "1.5", "true", "[3]", "3-layers", "null"])
def test_a_placement_that_is_none_says_what_to_write(written, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: cpu\nplacement: {written}\n")
    form = r"auto, all-device, or how many layers' KV lie in host memory, as in 20 or 20-host-layers"
    with pytest.raises(ProfileError, match=rf"mine\.yaml:2: placement is .*expected an integer >= 0 or a string \({form}\)"):
        load_profile(file)


@pytest.mark.parametrize("text", ["host", "-1", "3 layers", "", "1.5", "all-host"])
def test_what_is_no_placement(text):
    with pytest.raises(ValueError, match="is no placement, expected auto, all-device, or how many layers' KV lie in host memory"):
        parse(text)
    with pytest.raises(ProfileError, match="placement"):
        load_profile("cpu", sets=[f"placement={json.dumps(text)}"])


def test_a_38b_model_at_256k_tokens_on_eight_v100():
    """The paper's claim, by hand: 31.74 GiB less weights, activations and reserve, in layers of 2 * tokens * 8 heads * 128 * 2 bytes."""
    from hetero_attn.models.hosts import Host, Hosts

    profile = load_profile("v100")
    plan = plan_model(PANGU, Hosts((Host(profile, "cuda"),) * 8), context=262144)
    shared = plan.cooperation
    memory = int(31.74 * 2**30)                                                    # what a board of 32 GB reports
    layer = 2 * (262144 + profile.kv_block_size) * 8 * 128 * 2                     # a block more: a sequence may waste part of one
    for rank in plan.ranks:
        room = memory - (900 << 20) - rank.weights - rank.activations
        assert 8.9 < rank.weights / 2**30 < 9.3 and rank.activations < 1 << 30
        assert len(rank.placement.device) == room // layer - 2 and rank.total <= memory
    assert [len(rank.placement.host) for rank in plan.ranks] == [30] * 5 + [29] * 3
    assert shared.hosts[0].bytes == (5 * 30 + 3 * 29) * layer < 0.9 * 512 * 2**30  # of a DGX-1's 512 GiB
    # without cooperation it does not fit: 48 layers in the room of 20 or 21
    assert shared.largest_on_devices == min(
        ((memory - (900 << 20) - rank.weights - rank.activations) // 48 // (64 * 2 * 8 * 128 * 2) - 1) * 64 for rank in plan.ranks)
    assert 110_000 < shared.largest_on_devices < 120_000 < 262144 <= shared.largest and shared.bound == "host"
    assert plan.largest_context == 262144
    # a prompt's copies: the bus' rate, or the rank's share of the host memory's where that is less
    slow = plan_model(PANGU, Hosts((Host(load_profile("v100", sets=["hardware.host_memory_gbps=64"]), "cuda"),) * 8), context=262144)
    assert slow.cooperation.prefill_bus_s == pytest.approx(shared.prefill_bus_s * 12 / (0.75 * 64 / 8))
    # and the price: each rank's host layers are read through an eighth of the host's memory
    assert shared.token.host_s == pytest.approx(8 * 30 * 262144 * 2 * 8 * 128 * 2 / (0.75 * 136e9))
    assert shared.token.total_s > 20 * shared.token_on_devices.total_s
    assert shared.prefill_s > max(shared.prefill_device_s, shared.prefill_bus_s) * 0.99


def test_the_document_shows_what_the_command_prints(capsys):
    text = (ROOT / "docs" / "cooperation.md").read_text()
    assert "$ hetero-attn plan" in text
    for line in text.splitlines():
        if line.startswith("$ hetero-attn plan"):
            capsys.readouterr()
            assert main(shlex.split(line.removeprefix("$ hetero-attn "))) == 0
            printed = [row.rstrip() for row in capsys.readouterr().out.splitlines() if row.strip()]
            told = text.partition(line)[2].partition("```")[0]
            told = [row.rstrip() for row in told.splitlines() if row.strip()]
            assert told and [row for row in told if row != "..."] == [row for row in printed if row in told], line


def test_the_command_says_where_kv_lies_and_json_has_it_all(capsys):
    wanted = ["plan", str(PANGU), "--profile", "v100", "--tp", "8", "--context", "200000", "--json"]
    assert main(wanted) == 0
    found = json.loads(capsys.readouterr().out)
    shared = found["cooperation"]
    assert set(shared) >= {"context", "largest", "largest_on_devices", "bound", "token", "prefill_s", "hosts"}
    rank = found["ranks"][3]
    assert sorted(rank["device_layers"] + rank["host_layers"]) == list(range(48)) and rank["host_layers"]
    assert shared["hosts"][0]["bytes"] == sum(each["host_bytes"] for each in found["ranks"])
    assert found["token_s"] == pytest.approx(shared["token"]["total_s"])
    assert main([*wanted, "--placement", "all-device"]) == 2
    assert "cannot hold 200000 tokens: the KV cache needs at least" in capsys.readouterr().err
    # two hosts of four: half the ranks share a memory, and a token is nearly twice as quick
    assert main([*wanted, "--per-host", "4"]) == 0
    halves = json.loads(capsys.readouterr().out)["cooperation"]
    assert [host["ranks"] for host in halves["hosts"]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert halves["token"]["host_s"] == pytest.approx(shared["token"]["host_s"] / 2)
    assert main([*wanted, "--placement", "49"]) == 2
    assert capsys.readouterr().err.strip().endswith("placement asks for 49 layers on the host, the model has 48")
    for option, says in (("--placement=most", "is no placement"), ("--device-memory=3", "is no size"), ("--per-host=0", "at least 1")):
        assert main([*wanted, option]) == 2 and says in capsys.readouterr().err
    assert main(["plan", str(PANGU), "--profile", "h100", "--tp", "8", "--context", "262144"]) == 0
    assert "all 48 layers' KV fit on the device" in capsys.readouterr().out


def test_a_number_that_nobody_gave_is_asked_for(capsys):
    """Where layers lie and what that takes needs no rates; times do, and say so."""
    wanted = ["plan", str(PANGU), "--profile", "h100", "--tp", "2", "--context", "262144"]
    assert main(wanted) == 0
    text = capsys.readouterr().out
    assert "layers' KV on the device, " in text and "host memory: " in text and "with cooperation" in text
    assert "each further one not known" in text and "predicted, " not in text
    assert "predicted times are not known: give hardware.bus_gbps and hardware.host_memory_gbps (GB/s), with --set hardware." in text
    assert main([*wanted, "--set", "hardware.bus_gbps=50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    shared = found["cooperation"]
    assert found["token_s"] is shared["token"] is shared["prefill_s"] is shared["prefill_bus_s"] is None
    assert shared["missing"] == ["hardware.host_memory_gbps"] and shared["prefill_device_s"] > 0 and found["ranks"][0]["host_layers"]
    for name, ranks in (("a100", "4"), ("rtx4090", "8")):
        assert main(["plan", str(PANGU), "--profile", name, "--tp", ranks, "--context", "400000"]) == 0
        assert "predicted times are not known" in capsys.readouterr().out
    rates = ["--set", "hardware.host_memory_gbps=300", "--set", "hardware.bus_gbps=50"]
    assert main([*wanted, *rates]) == 0
    text = capsys.readouterr().out
    assert "of memory that nobody stated (hardware.host_memory_gib)" in text
    assert main([*wanted, *rates, "--set", "hardware.host_memory_gib=64"]) == 2
    assert "layers' KV on the host take" in capsys.readouterr().err


def test_ranks_of_several_hosts_in_a_file(tmp_path):
    file = tmp_path / "hosts.yaml"
    file.write_text("ranks:\n" + "".join(f"  - {{profile: v100, host: {name}, set: {{hardware.host_memory_gib: 300}}}}\n" for name in
                                         ("east", "east", "west", "east", "west", "west", "east", "west")))
    shared = plan_model(PANGU, read_hosts(file), context=262144).cooperation
    assert [(host.name, host.ranks) for host in shared.hosts] == [("east", (0, 1, 3, 6)), ("west", (2, 4, 5, 7))]
    file.write_text("ranks: [" + "{profile: v100, host: 3}, " * 8 + "]")
    assert plan_model(PANGU, read_hosts(file), context=1000).cooperation.hosts[0].name == "3"


def test_a_folder_without_weights_must_be_one(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        plan_model(tmp_path / "none", read_hosts(_one(tmp_path)))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text((PANGU / "config.json").read_text())
    (tmp_path / "half" / "pytorch_model.bin").write_text("")
    with pytest.raises(ModelError, match="is a pickle"):
        plan_model(tmp_path / "half", read_hosts(_one(tmp_path)))


def _one(tmp_path):
    file = tmp_path / "one.yaml"
    file.write_text("ranks: [{profile: v100}]")
    return file
