"""hetero-attn calibrate: it measures the paper's ranges at each site and rank, and what it writes is found again, by its own model only."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from hetero_attn.cli import main
from hetero_attn.collectives.choice import Fixed, Route, from_json
from hetero_attn.collectives.codec.calibration import CalibrationError, calibration_path, from_bytes, read
from hetero_attn.collectives.cost import LinkModel
from hetero_attn.collectives.tuning import Survey
from hetero_attn.models.calibration import RangeObserver, chunks_of, find_calibration, key_of, measure_ranges, share_calibration, summary
from hetero_attn.models.config import ModelConfig, ModelError
from hetero_attn.models.load import load_model
from hetero_attn.profile import load_profile, save_overlay
from hetero_attn.testing.ranks import on_ranks

TINY = Path(__file__).parents[1] / "examples" / "tiny-llama"
TEXT = "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total / len(values)\n\n" * 12
WORLD, CHUNKS, TOKENS = 2, 4, 32
SLOW = Survey(WORLD, ("alpha", "beta"), LinkModel(1e-3, 8 / 10e6, 8 / 10e6, 2e-4))      # 10 Mbit/s: what is smaller is quicker


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One run of the command over real ranks: (its JSON, the folder of the configuration, the text)."""
    folder = tmp_path_factory.mktemp("calibrate")
    text = folder / "text.py"
    text.write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HETERO_ATTN_CONFIG_DIR", str(folder))
        answer = folder / "answer.json"
        with answer.open("w") as out:
            code = run_command(["calibrate", str(TINY), "--text", str(text), "--tp", str(WORLD), "--chunks", str(CHUNKS),
                                "--chunk-tokens", str(TOKENS), "--json"], out)
    assert code == 0
    return json.loads(answer.read_text()), folder, text


def run_command(arguments: list[str], out) -> int:
    """The command in a process of its own: its ranks write to its standard output."""
    import subprocess
    import sys

    return subprocess.run([sys.executable, "-m", "hetero_attn", *arguments], stdout=out, timeout=240).returncode


@pytest.fixture
def configured(measured, monkeypatch):
    monkeypatch.setenv("HETERO_ATTN_CONFIG_DIR", str(measured[1]))
    return measured


def test_it_reports_every_site(configured):
    answer, folder, _ = configured
    layers = ModelConfig.from_dir(TINY).layers
    expected = [f"layers.{layer}.{name}" for layer in range(layers) for name in ("o_proj", "down_proj")]
    assert [row["site"] for row in answer["sites"]] == expected
    assert all(len(row["outlier_features"]) == 256 // 64 and row["bits_per_value"] == 4.1875 + 16 / 256 for row in answer["sites"])
    assert answer["chunks"] == CHUNKS and Path(answer["file"]).parent == folder / "overlays"
    assert not list((folder / "overlays").glob(".*safetensors*")), "a temporary file was left"


def watch(communicator, text: str) -> dict:
    """Each chunk's summands by a plain hook on this rank's o_proj and down_proj, and the file's numbers made of them by the formula."""
    profile = load_profile("cpu")
    model = load_model(TINY, profile, communicator=communicator)
    seen: dict[str, list] = {}
    for layer in model.layers:
        for module in (layer.attention.o_proj, layer.mlp.down_proj):
            module.register_forward_pre_hook(
                lambda module, inputs: seen.setdefault(module.site, []).append(module.partial(inputs[0]).float()))
    for chunk in text_chunks(text):
        cache = model.new_cache(len(chunk), 1)
        model(cache.step([cache.add_sequence()], [len(chunk)], torch.tensor(chunk)), cache)
    ranges = {}
    for site, batches in seen.items():
        low, high = batches[0].amin(0), batches[0].amax(0)
        for batch in batches[1:]:
            low, high = 0.99 * low + 0.01 * batch.amin(0), 0.99 * high + 0.01 * batch.amax(0)
        ranges[site] = low.tolist(), high.tolist()
    return ranges


def text_chunks(text: str) -> list[list[int]]:
    from hetero_attn.models.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_dir(TINY)
    return chunks_of(tokenizer.encode(text, add_special_tokens=False), CHUNKS, TOKENS, tokenizer.bos_id)


def test_ranges_are_the_formula_s(configured):
    answer, _, _ = configured
    outcomes = on_ranks(watch, (TEXT,), WORLD)
    assert not any(outcome.error for outcome in outcomes), outcomes[0].traceback
    found = read(Path(answer["file"]))
    assert found.world_size == WORLD and len(found.sites) == len(outcomes[0].result) == 10
    for site, ranges in found.sites.items():
        low = torch.tensor([outcome.result[site][0] for outcome in outcomes])
        high = torch.tensor([outcome.result[site][1] for outcome in outcomes])
        assert torch.allclose(ranges.lowest, low, atol=1e-5, rtol=1e-4) and torch.allclose(ranges.highest, high, atol=1e-5, rtol=1e-4)
        r = (2 * torch.maximum(low.abs(), high.abs())).sum(0)
        assert set(ranges.outliers.tolist()) == set(r.topk(256 // 64).indices.tolist())


def through_the_codec(communicator, set_: str) -> dict:
    """Load with the codec, run a chunk: logits' distance to those without it, and what was counted."""
    profile = load_profile("cpu", sets=[set_])
    chunk = text_chunks(TEXT)[0]

    def logits(model):
        cache = model.new_cache(len(chunk), 1)
        return model(cache.step([cache.add_sequence()], [len(chunk)], torch.tensor(chunk), last_only=False), cache)

    communicator.choice = Fixed(Route("one_shot"))
    model = load_model(TINY, profile, communicator=communicator)
    exact = logits(model).log_softmax(-1)
    communicator.choice = Fixed(Route("two_shot", profile.codec))
    coded = logits(model).log_softmax(-1)
    total = communicator.codecs.traffic.total()
    return {"kl": (exact.exp() * (exact - coded)).sum(-1).mean().item(), "bits": total.bits_per_value, "values": total.values,
            "sites": sorted(communicator.codecs.traffic.sites)}


def test_the_codec_finds_it(configured):
    outcomes = on_ranks(through_the_codec, ("codec=int4_outliers",), WORLD)
    assert not any(outcome.error for outcome in outcomes), outcomes[0].traceback
    for report in (outcome.result for outcome in outcomes):
        assert report["kl"] < 0.3 and report["bits"] < 4.3 and report["values"] and len(report["sites"]) == 10
    assert outcomes[0].result["kl"] == outcomes[1].result["kl"]


def test_tune_shows_the_calibrated_codec(configured, capsys):
    """Over a slow link `codec: auto` takes it at the model's sites; the listing says what packing costs, and what is chosen."""
    save_overlay(load_profile("cpu"), SLOW.settings(), world_size=WORLD)
    asked = ["tune", "--profile", "cpu", "--tp", str(WORLD), "--show", "--set", "codec=auto"]
    assert main([*asked, "--model", str(TINY)]) == 0
    shown = capsys.readouterr().out
    assert "codec int4_outliers: 4.25 bits a value" in shown and "with int4_outliers" in shown and "group32" not in shown
    assert main(asked) == 0
    shown = capsys.readouterr().out
    assert "codec int4_group32: 4.50 bits" in shown and "with int4_group32" in shown and "int4_outliers" not in shown
    assert main([*asked, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["codecs"]) == {"int4_group32", "int8_group32"}
    assert main(["tune", "--profile", "cpu", "--tp", "2", "--model", str(TINY)]) == 2


def auto_codec(communicator) -> dict:
    """What the choice is before a model brings its calibration, after it, and that both kinds of call go through."""
    from hetero_attn.collectives import tuning

    hosts = list(SLOW.hosts)
    profile = load_profile("cpu", sets=["codec=auto"])
    if communicator.rank == 0:
        profile = dataclasses.replace(profile, link=load_profile("cpu", world_size=WORLD).link)
    communicator.choice, source = tuning.settle(communicator, profile, hosts, worth_measuring=False)
    before = communicator.choice.pick("all_reduce", 1 << 18, torch.float32, "layers.0.o_proj")
    share_calibration(profile, ModelConfig.from_dir(TINY), communicator)
    picks = [communicator.choice.pick("all_reduce", size, torch.float32, site) for size, site in
             ((1 << 18, "layers.0.o_proj"), (1 << 18, "elsewhere"))]
    sums = [communicator.all_reduce(torch.ones(1024, 256), site=site) for site in ("layers.0.o_proj", "elsewhere")]
    return {"source": source, "before": before.codec, "picks": [pick.codec for pick in picks], "json": communicator.choice.to_json(),
            "sums": [total.mean().item() for total in sums], "sites": sorted(communicator.codecs.traffic.sites)}


def test_auto_takes_the_calibrated_codec_at_its_sites(configured):
    save_overlay(load_profile("cpu"), SLOW.settings(), world_size=WORLD)
    outcomes = on_ranks(auto_codec, (), WORLD)
    assert not any(outcome.error for outcome in outcomes), outcomes[0].traceback
    first, second = (outcome.result for outcome in outcomes)
    assert first["json"] == second["json"] and from_json(first["json"]).to_json() == first["json"]
    assert first["before"] == "int4_group32" and first["picks"] == ["int4_outliers", "int4_group32"]
    assert first["sums"] == second["sums"] and first["sums"] == pytest.approx([2, 2], rel=0.3)
    assert first["sites"] == ["elsewhere", "layers.0.o_proj"]


def test_without_one_all_ranks_say_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HETERO_ATTN_CONFIG_DIR", str(tmp_path))
    outcomes = on_ranks(through_the_codec, ("codec=int4_outliers",), WORLD)
    for outcome in outcomes:
        assert outcome.error == "ModelError" and f"hetero-attn calibrate {TINY} --text FILE --tp 2" in outcome.text
    outcomes = on_ranks(through_the_codec, ("codec=int4_group32",), WORLD)
    assert not any(outcome.error for outcome in outcomes), outcomes[0].traceback
    assert outcomes[0].result["bits"] < 4.6


def test_generate_says_so_before_ranks_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HETERO_ATTN_CONFIG_DIR", str(tmp_path))
    assert main(["generate", str(TINY), "--prompt", "a", "--tp", "2", "--set", "codec=int4_outliers"]) == 2
    assert "hetero-attn calibrate" in capsys.readouterr().err


def test_another_model_of_the_name_is_refused(configured, tmp_path):
    """The same folder name, other weights: the ranges are not this model's."""
    answer, _, _ = configured
    profile, other = load_profile("cpu"), tmp_path / "tiny-llama"
    found = find_calibration(profile, ModelConfig.from_dir(TINY), WORLD)
    assert found.facts["fingerprint"] == answer["fingerprint"] and len(summary(found)) == 10
    shutil.copytree(TINY, other)
    find_calibration(profile, ModelConfig.from_dir(other), WORLD)                    # a copy is the same model
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    with pytest.raises(ModelError, match="another model of that name"):
        find_calibration(profile, ModelConfig.from_dir(other), WORLD)


def test_a_damaged_file_is_named(configured, tmp_path, monkeypatch):
    answer, _, _ = configured
    monkeypatch.setenv("HETERO_ATTN_CONFIG_DIR", str(tmp_path))
    profile, config = load_profile("cpu"), ModelConfig.from_dir(TINY)
    path = calibration_path(key_of(profile, TINY, WORLD))
    path.parent.mkdir(parents=True)
    content = Path(answer["file"]).read_bytes()
    for damage in (content[:1000], content[:-8], b"", b"not a tensor in sight"):
        path.write_bytes(damage)
        with pytest.raises(ModelError, match="calibrate again"):
            find_calibration(profile, config, WORLD)
    again = from_bytes(content)
    assert from_bytes(again.to_bytes()).facts == again.facts == {name: answer[name] for name in again.facts}
    for site, ranges in read(Path(answer["file"])).sites.items():
        assert torch.equal(ranges.ranges, again.sites[site].ranges) and torch.equal(ranges.outliers, again.sites[site].outliers)
    with pytest.raises(CalibrationError, match="expected 'hetero-attn calibration 1'"):
        from safetensors.torch import save

        from_bytes(save({"a": torch.ones(1)}))


def test_one_rank_and_short_texts_are_refused(tmp_path, capsys):
    text = tmp_path / "short.txt"
    text.write_text("a = 1\n")
    for arguments, words in (
        (["--tp", "1"], "at least 2 ranks"), ([], "give --tp N"), (["--tp", "2"], "expected at least one chunk of 128"),
        (["--tp", "16"], "16"), (["--tp", "2", "--chunk-tokens", "4096"], "context has 1024"),
        (["--tp", "2", "--chunks", "0"], "--chunks is 0"),
    ):
        assert main(["calibrate", str(TINY), "--text", str(text), *arguments]) == 2
        assert words in capsys.readouterr().err
    assert main(["calibrate", str(TINY), "--text", str(tmp_path / "absent"), "--tp", "2"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_chunks_are_spread_over_the_text():
    assert chunks_of(range(100), 3, 10, None) == [list(range(0, 10)), list(range(30, 40)), list(range(60, 70))]
    assert chunks_of(range(20), 8, 10, 999) == [[999, *range(0, 9)], [999, *range(9, 18)]]
    assert chunks_of(range(5), 8, 10, None) == []


def observed_nan(communicator) -> str:
    observer = RangeObserver(communicator)
    try:
        observer.all_reduce(torch.tensor([[1.0, float("nan") if communicator.rank == 0 else 2.0]]), site="layers.0.o_proj")
    except ModelError as error:
        return str(error)
    return ""


def test_values_that_are_not_finite_end_the_calibration():
    outcomes = on_ranks(observed_nan, (), WORLD)
    assert all("layers.0.o_proj" in outcome.result for outcome in outcomes), "one rank had it, and the others waited"


def test_the_observer_is_asked_for():
    class Model:
        communicator = None

    with pytest.raises(TypeError, match="RangeObserver"):
        measure_ranges(Model(), [[1]])


def test_a_world_of_one_needs_none():
    from hetero_attn.communicator import SoloCommunicator

    share_calibration(load_profile("cpu", sets=["codec=int4_outliers"]), ModelConfig.from_dir(TINY), SoloCommunicator())
