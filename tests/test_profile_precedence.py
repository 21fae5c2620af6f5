"""Which of the five levels a value comes from, and that the profile says so."""

import pytest

from hetero_attn.profile import DeviceProfile, ProfileError, load_profile, save_overlay

KEYS = ("threads_per_rank", "kv_block_size", "prefill_chunk", "timeout_s", "hardware.units")      # level 0 .. level 4 states the first 0..4


@pytest.fixture
def levels(monkeypatch, tmp_path):
    """Each level states one key fewer than the one below it, so that every key is won by another level."""
    monkeypatch.setenv("HETERO_ATTN_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.delenv("HETERO_ATTN_PROFILE", raising=False)
    file = tmp_path / "mine.yaml"
    file.write_text("device: cpu\nkv_block_size: 1\nprefill_chunk: 1\ntimeout_s: 1\nhardware: {units: 1}\n")
    overlay = save_overlay(load_profile(file), {"prefill_chunk": 2, "timeout_s": 2, "hardware.units": 2})
    monkeypatch.setenv("HETERO_ATTN_SET", "timeout_s=3; hardware.units=3;")
    return file, overlay


def test_the_highest_level_that_states_a_value_wins(levels):
    file, overlay = levels
    profile = load_profile(file, sets=["hardware.units=4"])
    rows = {key: (value, origin) for key, value, origin in profile.resolved()}
    assert {key: rows[key] for key in KEYS} == {
        "threads_per_rank": (0, "built-in"),
        "kv_block_size": (1, f"{file}:2"),
        "prefill_chunk": (2, f"overlay {overlay}:7"),
        "timeout_s": (3.0, "environment HETERO_ATTN_SET"),
        "hardware.units": (4, "--set"),
    }
    assert overlay.read_text().splitlines()[6].strip() == "prefill_chunk: 2", "the line named is the line"
    assert dict(profile.origins) == {key: origin for key, (_, origin) in rows.items()}


def test_the_last_of_two_sets_wins(levels):
    assert load_profile(levels[0], sets=["hardware.units=4", "hardware.units=5"]).hardware.units == 5
    assert load_profile(levels[0], sets="hardware.units=6").hardware.units == 6, "a single string is one assignment"


def test_a_loaded_profile_takes_sets_and_nothing_else(levels):
    profile = load_profile(DeviceProfile(name="mine", device="cpu", kv_block_size=9), sets=["strict=true"])
    assert (profile.kv_block_size, profile.strict, profile.timeout_s) == (9, True, 30.0)
    assert [profile.origins[key] for key in ("kv_block_size", "strict", "timeout_s")] == ["Python", "--set", "built-in"]


def test_a_wrong_setting_in_the_environment_is_named(monkeypatch):
    monkeypatch.setenv("HETERO_ATTN_SET", "strict=true;kv_block=3")
    with pytest.raises(ProfileError) as raised:
        load_profile("cpu")
    assert str(raised.value) == "environment HETERO_ATTN_SET kv_block=3: unknown key kv_block; did you mean kv_block_size?"
