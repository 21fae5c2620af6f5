"""The tuned overlay: whom it applies to, what writing keeps, and what a crash or a damaged file does."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hetero_attn import overlay
from hetero_attn.overlay import OverlayKey, config_directory, read_overlay, write_overlay
from hetero_attn.profile import DeviceProfile, ProfileError, load_profile, save_overlay
from hetero_attn.profile_detect import device_name
from hetero_attn.profile_fields import leaves

LEAVES = leaves(DeviceProfile)
KEY = OverlayKey("cpu", "AMD EPYC, 2 cores", 2, "tiny-llama")


@pytest.fixture(autouse=True)
def config(monkeypatch, tmp_path):
    monkeypatch.setenv("HETERO_ATTN_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("HETERO_ATTN_PROFILE", raising=False)
    monkeypatch.delenv("HETERO_ATTN_SET", raising=False)
    return tmp_path


def values(key=KEY):
    return {path: entry.value for path, entry in read_overlay(key, LEAVES).items()}


def test_the_folder(monkeypatch, tmp_path):
    assert config_directory() == tmp_path and KEY.path().parent == tmp_path / "overlays"
    monkeypatch.delenv("HETERO_ATTN_CONFIG_DIR")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert config_directory() == tmp_path / "xdg" / "hetero_attn"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config_directory() == tmp_path / ".config" / "hetero_attn"


def test_each_profile_device_size_and_model_has_its_own_file():
    keys = [KEY, OverlayKey("cpu", "AMD EPYC, 2 cores", 2, None), OverlayKey("cpu", "AMD EPYC, 2 cores", None, "tiny-llama"),
            OverlayKey("cpu", "AMD EPYC (2 cores)", 2, "tiny-llama"), OverlayKey("edge", "AMD EPYC, 2 cores", 2, "tiny-llama"),
            OverlayKey("cpu", "AMD EPYC, 2 cores", 2, "tiny/llama"), OverlayKey("cpu", "AMD EPYC, 2 cores", 2, "../../etc/" + "x" * 300)]
    paths = [key.path() for key in keys]
    assert len(set(paths)) == len(keys) and all(path.parent == paths[0].parent and len(path.name) < 200 for path in paths)
    assert paths[0].name.startswith("cpu_amd-epyc-2-cores_tp2_tiny-llama_")
    with pytest.raises(ProfileError, match="world_size is 0, expected an integer >= 1 or null"):
        OverlayKey("cpu", "x", 0)


def test_what_is_written_is_read_with_its_line():
    assert values() == {}
    path = write_overlay(KEY, {"kv_block_size": 48, "hardware.matrix_shape": (8, 8, 4)}, LEAVES, {"kv_block_size": "2026-11-21: x"})
    found = read_overlay(KEY, LEAVES)
    assert {k: e.value for k, e in found.items()} == {"kv_block_size": 48, "hardware.matrix_shape": (8, 8, 4)}
    file, _, line = found["kv_block_size"].origin.rpartition(":")
    assert file == f"overlay {path}" and path.read_text().splitlines()[int(line) - 1].strip() == "kv_block_size: 48"


def test_writing_keeps_what_is_there_and_not_yours():
    write_overlay(KEY, {"kv_block_size": 48, "hardware.memory_gbps": 41.5}, LEAVES, {"kv_block_size": "one", "hardware.memory_gbps": "two"})
    path = write_overlay(KEY, {"kv_block_size": 64, "hardware.units": 2}, LEAVES, {"hardware.units": "three"})
    assert values() == {"kv_block_size": 64, "hardware.memory_gbps": 41.5, "hardware.units": 2}
    text = path.read_text()
    assert "two" in text and "three" in text and "one" not in text.split("notes:")[1], "an old note does not stand on a new value"
    assert [p.name for p in path.parent.iterdir() if p.name != ".lock"] == [path.name], "no temporary file is left"


@pytest.mark.parametrize("fault", ["replace", "fsync"])
def test_a_crash_leaves_the_old_file(monkeypatch, fault):
    path = write_overlay(KEY, {"kv_block_size": 48}, LEAVES)
    before = path.read_bytes()

    def crash(*_):
        raise OSError("the disk is gone")
    monkeypatch.setattr(overlay.os, fault, crash)
    with pytest.raises(OSError, match="the disk is gone"):
        write_overlay(KEY, {"kv_block_size": 64}, LEAVES)
    assert path.read_bytes() == before and values() == {"kv_block_size": 48}
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([".lock", path.name])


def test_two_writers_lose_nothing():
    keys = ("kv_block_size", "prefill_chunk", "hardware.units", "hardware.l1_bytes")     # each opens the lock for itself, as processes do

    def write(key):
        for value in range(1, 9):
            write_overlay(KEY, {key: value}, LEAVES)
    with ThreadPoolExecutor(len(keys)) as pool:
        list(pool.map(write, keys))
    assert values() == dict.fromkeys(keys, 8)


@pytest.mark.parametrize("damage, message", [
    (lambda text: text[: text.index("world_size")], "{label}: world_size is missing, expected 2"),
    (lambda text: text + "  kv_blok_size: 3\n", "{label}:8: unknown key kv_blok_size; did you mean kv_block_size?"),
    (lambda text: text.replace("48", "lots"), "{label}:7: kv_block_size is 'lots' (a string), expected an integer >= 1"),
    (lambda text: text.replace("values:", "values: ["), "{label}:"),
    (lambda text: text.replace("profile: cpu", "profile: edge"), "{label}: profile is 'edge', expected 'cpu' for a file of this name"),
    (lambda text: text.replace("kv_block_size: 48", "name: x"), "{label}:7: name cannot be overlaid, it says what the profile is"),
    (lambda text: text + "notes: {strict: x}\n", "{label}:8: notes.strict is 'x', expected a string on one of the values: kv_block_size"),
    (lambda text: text + "notes: 3\n", "{label}:8: notes is no mapping, expected keys under it"),
    (lambda text: "", "{label}: the file is empty, expected `key: value` lines"),
    (lambda text: "\x00\x01", "{label}: not valid YAML"),
])
def test_a_damaged_file_is_one_clear_error_and_stays_as_it_is(damage, message):
    path = write_overlay(KEY, {"kv_block_size": 48}, LEAVES)
    path.write_text(damage(path.read_text()))
    before = path.read_bytes()
    with pytest.raises(ProfileError) as raised:
        read_overlay(KEY, LEAVES)
    assert str(raised.value).startswith(message.format(label=f"overlay {path}")), str(raised.value)
    assert str(raised.value).endswith("; repair or delete this overlay") and "\n" not in str(raised.value)
    with pytest.raises(ProfileError, match=r"repair or delete this overlay, nothing was written$"):
        write_overlay(KEY, {"strict": True}, LEAVES)
    assert path.read_bytes() == before


@pytest.mark.parametrize("wrong, notes, message", [
    ({"hardware.alignments": {"ub_bytes": 2}}, None, "overlay of profile 'cpu': hardware.alignments is a section, expected one of its "
     "keys: ub_bytes, l1_bytes, l0a_bytes, l0b_bytes, l0c_bytes"),
    ({"kv_blok_size": 3}, None, "overlay of profile 'cpu': unknown key kv_blok_size; did you mean kv_block_size?"),
    ({"kv_block_size": 0}, None, "overlay of profile 'cpu': kv_block_size is 0, expected an integer >= 1"),
    ({"device": "cuda"}, None, "overlay of profile 'cpu': device cannot be overlaid, it says what the profile is"),
    ({"strict": True}, {"dtype": "x"}, "overlay of profile 'cpu': notes.dtype is 'x', expected a string on a value written with it"),
])
def test_a_wrong_value_is_not_written(wrong, notes, message):
    with pytest.raises(ProfileError) as raised:
        write_overlay(KEY, wrong, LEAVES, notes)
    assert str(raised.value) == message and not KEY.path().exists()


def test_the_more_special_overlay_wins():
    cpu = load_profile("cpu")
    save_overlay(cpu, {"kv_block_size": 1, "prefill_chunk": 1, "timeout_s": 1, "threads_per_rank": 1})
    save_overlay(cpu, {"prefill_chunk": 2, "timeout_s": 2, "threads_per_rank": 2}, model="m")
    save_overlay(cpu, {"timeout_s": 3, "threads_per_rank": 3}, world_size=2)
    path = save_overlay(cpu, {"threads_per_rank": 4}, world_size=2, model="m", notes={"threads_per_rank": "measured"})
    assert device_name(torch.device("cpu")) in path.read_text()

    def tuned(**whose):
        profile = load_profile("cpu", **whose)
        return profile.kv_block_size, profile.prefill_chunk, profile.timeout_s, profile.threads_per_rank
    assert tuned(world_size=2, model="m") == (1, 2, 3, 4)
    assert tuned(world_size=2) == (1, 1, 3, 3)
    assert tuned(model="m") == (1, 2, 2, 2)
    assert tuned() == (1, 1, 1, 1)
    assert load_profile("edge").timeout_s == 60, "another profile is another key"


def test_an_overlay_of_a_device_that_is_not_here_does_not_apply():
    key = OverlayKey("v100", "Tesla V100-SXM2-32GB")
    write_overlay(key, {"kv_block_size": 1}, LEAVES)
    if not torch.cuda.is_available():
        assert load_profile("v100").kv_block_size == 64
        with pytest.raises(ProfileError, match="torch sees 0 cuda devices"):
            save_overlay(load_profile("v100"), {"kv_block_size": 1})
    assert values(key) == {"kv_block_size": 1}
