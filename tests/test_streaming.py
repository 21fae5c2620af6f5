"""Streamed models give what held ones give, within the memory they promise; folders of one rank hold it, checksummed, and nothing else."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="transformers writes the checkpoints these tests read")

from safetensors import safe_open
from tiny_checkpoint import write_checkpoint
from tiny_families import make_model

from hetero_attn.communicator import SoloCommunicator
from hetero_attn.models import export as exporting
from hetero_attn.models import streaming
from hetero_attn.models.config import ModelError
from hetero_attn.models.export import check, export
from hetero_attn.models.generate import generate
from hetero_attn.models.load import load_model
from hetero_attn.models.sampling import SamplingParams
from hetero_attn.models.schedule_setup import make_schedule
from hetero_attn.parallel.launch import run_ranks
from hetero_attn.parallel.schedule_choice import Schedule
from hetero_attn.parallel.window import WindowError
from hetero_attn.profile import load_profile

NAMES = ["llama3.2-tied", "llama-biases-linear", "qwen3", "gemma2", "mixtral"]
PROMPTS = [[3, 4, 5, 6, 7], [8, 9]]
PARAMS = SamplingParams(max_new_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name in NAMES:
        made[name] = tmp_path_factory.mktemp(name.replace(".", "-"))
        make_model(name).save_pretrained(made[name])
        export(made[name], made[name] / "parts", 1, vocabulary="master")
    return made


def logits_of(folder, **options):
    """Logits of a prompt and of two decode steps [3, vocab], on one rank."""
    model = load_model(folder, "cpu", communicator=SoloCommunicator(), **options)
    cache = model.new_cache(16, 1)
    sequence = cache.add_sequence()
    rows = [model(cache.step([sequence], [len(tokens)], tokens), cache) for tokens in (PROMPTS[0], [11], [12])]
    return torch.cat(rows), model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_streamed_logits_are_the_held_ones_to_the_bit(folders, name, dtype):
    stored = make_model(name).to(getattr(torch, dtype))
    folder = folders[name].with_name(f"{folders[name].name}-{dtype}")
    stored.save_pretrained(folder)
    expected, _ = logits_of(folder, dtype=dtype)
    for options in ({"window": 1}, {"window": 4}, {"memory_budget": "8GiB"}):
        found, model = logits_of(folder, dtype=dtype, **options)
        assert torch.equal(found, expected), options
        assert bool(model.memory.read_bytes) == ("window" in options)
        assert model.window.statistics.rewound == 0


@pytest.mark.parametrize("name", NAMES)
def test_weights_stay_in_the_dtype_they_are_stored_in(folders, name):
    """A model computed in fp32 from bf16 storage streams bf16 and widens it where it is used."""
    folder = folders[name].with_name(f"{folders[name].name}-wide")
    make_model(name).to(torch.bfloat16).save_pretrained(folder)
    expected, _ = logits_of(folder, dtype="float32")
    found, model = logits_of(folder, dtype="float32", window=2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert {tensor.dtype for piece in model.window.pieces for tensor in piece.tensors} == {torch.bfloat16}


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_one_rank_gives_the_same(folders, name):
    expected, _ = logits_of(folders[name])
    for options in ({}, {"window": 2}, {"memory_budget": "8GiB"}):
        assert torch.equal(logits_of(folders[name] / "parts", **options)[0], expected)


@pytest.fixture
def short_runs(monkeypatch):
    """Weights of test models go through the window in many runs, and folders have as many checksums."""
    for module in (streaming, exporting):
        monkeypatch.setattr(module, "RUN_ROWS", 8)
    monkeypatch.setattr(streaming, "RUN_BYTES", 1)


@pytest.mark.parametrize("name", NAMES)
def test_runs_of_rows_give_the_bits_of_whole_weights(folders, tmp_path, short_runs, name):
    expected, _ = logits_of(folders[name])
    export(folders[name], tmp_path, 1, vocabulary="master")
    for folder in (folders[name], tmp_path):
        found, model = logits_of(folder, window=2)
        assert torch.equal(found, expected)
        assert len(model.window.pieces) > 20
        assert folder is not tmp_path or sum(len(piece.checks) for piece in model.window.pieces) >= len(model.window.pieces)
    old, model = logits_of(folders[name] / "parts", window=2)             # a checksum there is for more rows: they stay together
    assert torch.equal(old, expected) and all(piece.checks for piece in model.window.pieces)


def test_a_flipped_bit_in_any_run_is_refused(folders, tmp_path, short_runs):
    export(folders["qwen3"], tmp_path, 1, vocabulary="master")
    file = tmp_path / "rank-0-of-1" / "layer-001.mlp.safetensors"
    good = file.read_bytes()
    for place in (-9, 8 + int.from_bytes(good[:8], "little") + 5, len(good) // 2):
        bad = bytearray(good)
        bad[place] ^= 4
        file.write_bytes(bad)
        with pytest.raises(WindowError, match=r"layer-001.mlp.safetensors is damaged: the checksum of layers.1.mlp.\w+_proj.\d+ "):
            logits_of(tmp_path, window=2)


def texts(folder, options):
    model = load_model(folder, "edge", **options)
    found = generate(model, PROMPTS, PARAMS)
    return [list(each.token_ids) for each in found], model.window.statistics.rewound if model.window else 0


@pytest.mark.ranks
@pytest.mark.parametrize("vocabulary, world_size", [("master", 2), ("sharded", 3)])
def test_ranks_stream_the_text_of_one(folders, tmp_path, vocabulary, world_size):
    folder = folders["qwen3"]
    expected = texts(folder, {"communicator": SoloCommunicator(), "vocabulary": vocabulary})[0]
    export(folder, tmp_path, world_size, vocabulary=vocabulary)
    for place in (folder, tmp_path):
        found = run_ranks(texts, (place, {"vocabulary": vocabulary, "window": 2}), world_size, threads=1)
        assert found[0] == (expected, 0) and found[1] == ([], 0)


def test_a_budget_too_small_names_the_smallest_that_works(folders):
    with pytest.raises(ModelError, match=r"rank 0 has 50 MiB and needs [0-9.]+ [MG]iB .*the smallest that works is") as caught:
        logits_of(folders["qwen3"], memory_budget="50MiB")
    smallest = str(caught.value).partition("that works is ")[2].partition(";")[0]
    _, model = logits_of(folders["qwen3"], memory_budget=f"{int(smallest.removesuffix('MiB')) + 64}MiB")
    assert model.memory.predicted <= model.memory.budget
    with pytest.raises(ModelError, match="is no size, expected a number and a unit"):
        logits_of(folders["qwen3"], memory_budget="3")


GROWTH = """
import json, sys, torch
from hetero_attn.communicator import SoloCommunicator
from hetero_attn.models.budget import peak_bytes
from hetero_attn.models.generate import generate
from hetero_attn.models.load import load_model
from hetero_attn.models.sampling import SamplingParams
torch.set_num_threads(1)
model = load_model(sys.argv[1], "edge", communicator=SoloCommunicator(), memory_budget=sys.argv[2] or None, cache_tokens=64)
generate(model, [[3, 4, 5]], SamplingParams(max_new_tokens=12, ignore_eos=True))
memory = model.memory
print(json.dumps({"peak": peak_bytes(), "predicted": memory.predicted, "budget": memory.budget, "read": memory.read_bytes}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_the_peak_is_the_predicted_one_and_within_the_budget(tmp_path):
    """225 MB of weights in a process that may have 64 MiB beside Python and torch."""
    write_checkpoint(tmp_path, dtype=torch.bfloat16, hidden_size=1024, intermediate_size=3072, num_hidden_layers=8, num_attention_heads=16,
                     num_key_value_heads=8, head_dim=64, vocab_size=16384)
    assert (tmp_path / "model.safetensors").stat().st_size > 220e6

    def peak(budget):
        ran = subprocess.run([sys.executable, "-c", GROWTH, str(tmp_path), budget],
                             env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, timeout=200)
        assert not ran.returncode, ran.stderr
        return json.loads(ran.stdout)

    all_of_it = peak("4GiB")
    assert not all_of_it["read"]
    budget = all_of_it["predicted"] - (160 << 20)
    found = peak(f"{budget >> 20}MiB")
    assert found["read"] > 150 << 20
    assert found["peak"] <= 1.05 * found["budget"] and found["peak"] <= 1.1 * found["predicted"]
    assert found["peak"] > found["predicted"] - (48 << 20)                # the prediction is none that any run would meet


# ---- folders ----


def test_a_worker_has_its_slices_and_no_vocabulary(folders, tmp_path):
    folder = folders["qwen3"]
    shutil.copy(write_checkpoint(tmp_path / "other") / "tokenizer.json", folder / "tokenizer.json")
    try:
        export(folder, tmp_path / "parts", 3, vocabulary="master")
    finally:
        (folder / "tokenizer.json").unlink()
    sizes = []
    for rank in range(3):
        own = tmp_path / "parts" / f"rank-{rank}-of-3"
        names = {file.name for file in own.iterdir()}
        assert ("tokenizer.json" in names) == ("embedding.safetensors" in names) == (rank == 0)
        assert not [name for name in names if not name.endswith((".safetensors", ".json"))]
        sizes.append(sum(file.stat().st_size for file in own.glob("layer-*.safetensors")))
        assert check(own) > 0
    whole = (folder / "model.safetensors").stat().st_size
    assert max(sizes) < whole / 2
    with pytest.raises(ModelError, match="holds slices for 3 ranks, and 1 are running"):
        load_model(tmp_path / "parts", "cpu", communicator=SoloCommunicator())


@pytest.mark.parametrize("world_size", [1, 3])
def test_fused_experts_are_cut_too(folders, tmp_path, world_size):
    """transformers writes a tensor an expert unless it is asked not to; both give the same folders, to the byte."""
    make_model("mixtral").save_pretrained(tmp_path / "fused", save_original_format=False)
    with safe_open(tmp_path / "fused" / "model.safetensors", "pt") as opened:
        assert "model.layers.0.mlp.experts.gate_up_proj" in opened.keys()
    export(tmp_path / "fused", tmp_path / "parts", world_size)
    export(folders["mixtral"], tmp_path / "separate", world_size)
    for rank in range(world_size):
        name = f"rank-{rank}-of-{world_size}"
        assert check(tmp_path / "parts" / name)
        ours, theirs = (tensors_of(tmp_path / place / name) for place in ("parts", "separate"))
        assert ours.keys() == theirs.keys() and len([key for key in ours if ".w1." in key]) == 5 * 2
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    if world_size == 1:
        expected, _ = logits_of(folders["mixtral"])
        for options in ({}, {"window": 2}):
            assert torch.equal(logits_of(tmp_path / "parts", **options)[0], expected)


def tensors_of(folder):
    """Every tensor of a rank's folder, under its name without how the checkpoint calls the block."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {f"{file.name} {key.replace('block_sparse_moe', 'mlp')}": opened.get_tensor(key) for key in opened.keys()}
    return found


def test_fused_experts_of_another_shape_are_refused(tmp_path):
    make_model("mixtral").save_pretrained(tmp_path, save_original_format=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 36}))
    with pytest.raises(ModelError, match=r"experts\.(gate_up|down)_proj has shape .*, config.json asks for"):
        export(tmp_path, tmp_path / "parts", 2)


def test_quantized_fused_experts_are_refused_by_name(tmp_path):
    from safetensors.torch import load_file, save_file

    make_model("mixtral").save_pretrained(tmp_path, save_original_format=False)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{name} is F8_E4M3, expected one of .*; quantized checkpoints are not supported"):
        export(tmp_path, tmp_path / "parts", 2)


def test_an_interrupted_export_goes_on(folders, tmp_path, monkeypatch):
    from hetero_attn.models import export as module

    real, calls = module._RankPlan.write, []

    def fail(self, file, shards):
        calls.append(file.name)
        if len(calls) == 4:
            (file.parent / "junk.part").write_bytes(b"half")
            raise KeyboardInterrupt
        return real(self, file, shards)

    monkeypatch.setattr(module._RankPlan, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        export(folders["qwen3"], tmp_path, 2)
    with pytest.raises(ModelError, match="unfinished export; run the same hetero-attn shard again"):
        load_model(tmp_path / "rank-0-of-2", "cpu", communicator=SoloCommunicator())
    calls.extend(["..."] * 10)
    first, _ = export(folders["qwen3"], tmp_path, 2)
    assert first.kept > 0 and first.written > 0
    assert all(each.written == 0 for each in export(folders["qwen3"], tmp_path, 2))
    with pytest.raises(ModelError, match="another source or partition"):
        export(folders["qwen3"], tmp_path, 2, vocabulary="sharded")
    assert check(tmp_path / "rank-0-of-2") and check(tmp_path / "rank-1-of-2")


@pytest.mark.parametrize("part", ["layer-001.mlp.safetensors", "layer-000.attention.safetensors", "held.safetensors", "head.safetensors",
                                  "embedding.safetensors"])
@pytest.mark.parametrize("options", [{}, {"window": 2}, {"memory_budget": "8GiB"}], ids=["held", "window", "budget"])
def test_a_flipped_bit_is_refused(folders, tmp_path, part, options):
    shutil.copytree(folders["qwen3"] / "parts" / "rank-0-of-1", tmp_path / "damaged")
    file = tmp_path / "damaged" / part
    content = bytearray(file.read_bytes())
    with safe_open(file, "pt") as opened:
        assert opened.keys()
    place = 4 * PROMPTS[0][0] * 80 + len(content) - (os.path.getsize(file) - 4096) if part.startswith("embed") else len(content) - 9
    content[place] ^= 4
    file.write_bytes(content)
    with pytest.raises((ModelError, WindowError), match=f"{part} is damaged: the checksum of"):
        logits_of(tmp_path / "damaged", **options)
    with pytest.raises(ModelError, match=f"{part} is damaged: the checksum of"):
        check(tmp_path / "damaged")


@pytest.mark.parametrize("place", [-9, 4], ids=["data", "header"])
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "interrupted"])
def test_run_again_an_export_writes_what_is_damaged_anew(folders, tmp_path, place, finished):
    """The remedy that a damaged slice's error names; a file of the right size is no good file."""
    (made,) = export(folders["qwen3"], tmp_path, 2, ranks=[1])
    file = made.folder / "layer-000.mlp.safetensors"
    before = file.read_bytes()
    if not finished:
        manifest = json.loads((made.folder / "shard.json").read_text())
        lines = [{"source": manifest["source"]}, *({name: facts} for name, facts in manifest["files"].items())]
        (made.folder / "export.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (made.folder / "shard.json").unlink()
    content = bytearray(before)
    content[place] ^= 4
    file.write_bytes(content)
    told = []
    (again,) = export(folders["qwen3"], tmp_path, 2, ranks=[1], progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told) and told[-1][0] == told[-1][1] and len(told) > 3
    assert 0 < again.written <= len(before) and again.kept == made.written + sizes_of_headers(made.folder) - len(before)
    assert file.read_bytes() == before and check(made.folder)


def sizes_of_headers(folder):
    return sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in folder.glob("*.safetensors"))


def test_truncated_missing_and_foreign_folders_are_refused(folders, tmp_path):
    good = folders["qwen3"] / "parts" / "rank-0-of-1"

    def broken(name, act):
        folder = tmp_path / name
        shutil.copytree(good, folder)
        act(folder)
        with pytest.raises(ModelError) as caught:
            load_model(folder, "cpu", communicator=SoloCommunicator())
        return str(caught.value)

    assert "is truncated" in broken("short", lambda folder: os.truncate(folder / "layer-000.mlp.safetensors", 9000))
    assert "does not exist" in broken("gone", lambda folder: (folder / "layer-001.attention.safetensors").unlink())
    assert "cannot be read as JSON" in broken("cut", lambda folder: os.truncate(folder / "shard.json", 300))
    assert "is damaged" in broken("odd", lambda folder: (folder / "shard.json").write_text('{"format": "hetero_attn shard", "version": 1}'))
    other = folders["gemma2"] / "config.json"
    assert "is not that of the export" in broken("other", lambda folder: shutil.copy(other, folder / "config.json"))
    for name in ("model.layers.0.self_attn.q_proj.weight",):
        manifest = json.loads((good / "shard.json").read_text())
        facts = manifest["files"]["layer-000.attention.safetensors"]["tensors"][name]
        assert facts["shape"][0] == 120 and len(facts["sha256"]) == 1


@pytest.mark.parametrize("schedule, says", [("weave", True), ("tiled", True), ("auto", False), ("plain", False)])
def test_a_schedule_beside_streaming_is_answered_with_a_reason(caplog, schedule, says):
    from types import SimpleNamespace

    decoder = SimpleNamespace(communicator=SimpleNamespace(world_size=2, rank=0), window=object())
    assert type(make_schedule(decoder, load_profile("edge", sets=(f"schedule={schedule}",)))) is Schedule
    assert (f"schedule {schedule} is not used, steps run plain: weights are streamed" in caplog.text) is says
