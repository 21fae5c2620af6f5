"""Tuned tiles: kept in one file a device and kernel digest, written in one step, damaged files passed over with a warning."""

import json
import os
import subprocess
import sys
import threading
import types
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hetero_attn_triton import tuned_tiles
from hetero_attn_triton.launching import GpuLauncher
from hetero_attn_triton.tiling import Tile, shape_class
from hetero_attn_triton.tuned_tiles import digest, load_tuned, save_tuned, tuned_path
from hetero_attn_triton.tuning import quickest, specs

from hetero_attn.artifacts import CacheError

NAME = "NVIDIA H100 80GB HBM3"
A, B = Tile(64, 64, 4, 3), Tile(0, 32, 4, 2)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HETERO_ATTN_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_kept_and_found(own_cache):
    assert load_tuned(NAME) == {}
    path = save_tuned(NAME, {"prefill-d128-v128-half": A}, {"prefill-d128-v128-half": 12.345})
    assert path == own_cache / "triton-tiles" / f"nvidia-h100-80gb-hbm3-{digest()}.json"
    save_tuned(NAME, {"decode-d128-v128-half": B}, {})
    assert load_tuned(NAME) == {"prefill-d128-v128-half": A, "decode-d128-v128-half": B}
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    kept = json.loads(path.read_text())
    assert kept["device"] == NAME and kept["tiles"]["prefill-d128-v128-half"]["microseconds"] == pytest.approx(12.345, abs=0.01)
    assert kept["kernels"] == digest() and [each.name for each in path.parent.iterdir()] == [path.name]
    assert load_tuned("another device") == {}


def test_another_kernel_is_measured_anew(monkeypatch):
    save_tuned(NAME, {"x": A}, {})
    monkeypatch.setattr(tuned_tiles, "digest", lambda: "0" * 12)
    assert load_tuned(NAME) == {}


@pytest.mark.parametrize(("text", "words"), [
    ("{", "are not used"), ('{"format": 9, "tiles": {}}', "format is 9, expected 1"),
    ('{"format": 1, "tiles": {"x": {"rows": 63, "keys": 64, "warps": 4, "stages": 2}}}', "expected powers of 2 for rows"),
    ('{"format": 1, "tiles": {"x": {"rows": 64, "keys": 8, "warps": 4, "stages": 2}}}', "expected powers of 2"),
    ('{"format": 1, "tiles": {"x": {"rows": 64, "keys": 64, "warps": 4, "stages": 99}}}', "1 to 8 stages"),
    ('{"format": 1, "tiles": []}', "are not used"),
])
def test_a_damaged_file_is_passed_over(text, words):
    tuned_path(NAME).parent.mkdir()
    tuned_path(NAME).write_text(text)
    with pytest.warns(UserWarning, match=words):
        assert load_tuned(NAME) == {}


def test_readers_see_whole_files():
    stop, seen = threading.Event(), []

    def read():
        while not stop.is_set():
            seen.append(len(load_tuned(NAME)))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for index in range(60):
            save_tuned(NAME, {f"class-{index}": A}, {})
    finally:
        stop.set()
        reader.join()
    assert all(before <= after for before, after in pairwise(seen)) and load_tuned(NAME).keys() == {f"class-{index}" for index in range(60)}


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HETERO_ATTN_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(CacheError, match=r"tuned tiles cannot be kept in .*; set HETERO_ATTN_CACHE_DIR to a folder of yours"):
        save_tuned(NAME, {"x": A}, {})


def test_the_quickest_of_those_that_run():
    times = {A: 3.0, B: 2.0}

    def time_of(tile):
        if tile not in times:
            raise RuntimeError("out of resource: shared memory\nmore")
        return times[tile]

    best, found = quickest([A, Tile(128, 128, 8, 3), B], time_of)
    assert best == B and found[Tile(128, 128, 8, 3)] == "RuntimeError: out of resource: shared memory"
    with pytest.raises(RuntimeError, match="no tile ran"):
        quickest([Tile(16, 16, 1, 1)], time_of)


def test_what_is_measured():
    classes = [shape_class(spec) for spec in specs([64, 128])]
    assert classes == ["prefill-d64-v64-half", "decode-d64-v64-half", "prefill-d128-v128-half", "decode-d128-v128-half"]
    assert shape_class(replace(specs([128])[0], head_dim=80, v_head_dim=80)) == "prefill-d128-v128-half"


def test_a_launcher_reads_them_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: NAME)
    save_tuned(NAME, {"x": A}, {})
    launcher = GpuLauncher()
    assert launcher.tuned(torch.device("cuda", 0)) == {"x": A}
    save_tuned(NAME, {"y": B}, {})
    assert launcher.tuned(torch.device("cuda", 0)) == {"x": A} and GpuLauncher().tuned(torch.device("cuda", 0)) == {"x": A, "y": B}


def test_the_drivers_numbers(monkeypatch):
    facts = types.SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232448, major=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    found = GpuLauncher().hardware(torch.device("cuda", 0))
    assert (found.units, found.shared_memory_bytes, found.wide_products) == (132, 232448, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_command_without_a_gpu():
    done = subprocess.run([sys.executable, "-m", "hetero_attn_triton.tuning", "--dims", "64"], capture_output=True, text=True)
    assert done.returncode == 3 and "tuning needs a GPU that Triton serves: torch" in done.stderr
    done = subprocess.run([sys.executable, "-m", "hetero_attn_triton.tuning", "--dims", "64,999"], capture_output=True, text=True)
    assert done.returncode == 2 and "head_dim is 999, the kernel has 1 to 256" in done.stderr
