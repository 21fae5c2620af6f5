"""Reading safetensors: each rank its own slices and no byte more, and one clear line for every kind of broken checkpoint."""

import json
import struct
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="transformers writes the checkpoints these tests read")

from safetensors.torch import load_file, save_file
from tiny_families import make_model

from hetero_attn.communicator import Communicator
from hetero_attn.models import load, weights
from hetero_attn.models.config import ModelConfig, ModelError
from hetero_attn.models.decoder import Decoder
from hetero_attn.models.load import load_model
from hetero_attn.models.weights import Checkpoint
from hetero_attn.parallel.schedule_choice import Schedule
from hetero_attn.profile import load_profile

NAMES = ["llama3.2-tied", "llama-biases-linear", "qwen3", "gemma2", "mixtral"]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name in NAMES:
        made[name] = tmp_path_factory.mktemp(name.replace(".", "-"))
        make_model(name).save_pretrained(made[name])
    return made


@pytest.fixture
def broken(folders, tmp_path):
    """A copy of a checkpoint to break."""
    for file in folders["qwen3"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


class OneRank(Communicator):
    """A rank without its group. Loading asks whether all ranks mean the same model, and what rank 0's settings are: here they agree."""

    def broadcast(self, x, src=0, *, site=""):
        return x

    def all_gather(self, x, dim=0, *, sizes=None, site=""):
        return torch.cat([x] * self.world_size, dim)


class SliceCounter:
    """safe_open, but it only knows get_slice and counts what is taken out of it."""

    def __init__(self, taken):
        self.taken = taken

    def __call__(self, file, framework):
        self.opened = self.real(file, framework=framework)
        return self

    def __enter__(self):
        self.file = self.opened.__enter__()
        return self

    def __exit__(self, *exception):
        return self.opened.__exit__(*exception)

    def get_slice(self, name):
        tensor, taken = self.file.get_slice(name), self.taken

        class Slice:
            def __getitem__(self, index):
                part = tensor[index]
                taken.append((name, part.nbytes))
                return part

        return Slice()


@pytest.fixture
def taken(monkeypatch):
    counter = SliceCounter([])
    counter.real = weights.safe_open
    monkeypatch.setattr(weights, "safe_open", counter)
    return counter.taken


def make_decoder(folder, rank=0, world_size=1, vocabulary="sharded", dtype=torch.float32):
    """A rank's decoder without its group."""
    return Decoder(ModelConfig.from_dir(folder), OneRank(rank, world_size), dtype=dtype, vocabulary=vocabulary)


def load_rank(folder, *rank, **options):
    decoder, checkpoint = make_decoder(folder, *rank, **options), Checkpoint(folder)
    shards = list(decoder.shards(set(checkpoint.entries)))
    checkpoint.load(shards)
    return decoder, shards


@pytest.mark.parametrize("vocabulary", ["sharded", "master"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_rank_reads_its_share_and_no_more(folders, taken, name, world_size, vocabulary):
    config, whole = ModelConfig.from_dir(folders[name]), load_file(folders[name] / SINGLE)
    small = sum(t.nbytes for key, t in whole.items() if "norm" in key or key.endswith(("bias", "gate.weight")))      # replicated, or nearly
    vocab = sum(t.nbytes for key, t in whole.items() if key in ("model.embed_tokens.weight", "lm_head.weight"))
    total = sum(t.nbytes for t in whole.values())
    read = []
    for rank in range(world_size):
        taken.clear()
        decoder, _ = load_rank(folders[name], rank, world_size, vocabulary=vocabulary)
        read.append(sum(count for _, count in taken))
        held = {parameter.data_ptr(): parameter.nbytes for parameter in decoder.parameters() if parameter.numel()}
        assert read[-1] == sum(held.values())                                       # every byte that was read is kept, once
        # the largest share any rank can have of heads and FFN columns, after the layers' own granularity (whole heads and KV groups)
        q, kv = len(decoder.partition.q_heads) / config.q_heads, len(decoder.partition.kv_heads) / config.kv_heads
        share = max(q, kv, len(decoder.partition.ffn) / config.intermediate_size)
        rows = len(decoder.partition.vocab) / config.vocab_size
        assert read[-1] <= share * (total - vocab - small) + rows * vocab + small
    assert sum(read) >= total
    if world_size > 1:
        assert max(read) < total if vocabulary == "sharded" else min(read) <= total - vocab


@pytest.mark.parametrize("name", NAMES)
def test_the_ranks_slices_make_up_the_checkpoint(folders, name):
    """Each tensor is put together again from what three ranks hold, every element equal and none left out."""
    whole = load_file(folders[name] / SINGLE)
    rebuilt = {key: torch.full_like(tensor, float("nan")) for key, tensor in whole.items()}
    for rank in range(3):
        for shard in load_rank(folders[name], rank, 3)[1]:
            if shard.into.numel():
                rebuilt[shard.name][shard.index or slice(None)] = shard.into
    for key, tensor in whole.items():
        assert torch.equal(rebuilt[key], tensor), key


def test_many_files_and_an_index_read_as_one(folders, tmp_path):
    make_model("qwen3").save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3 and (tmp_path / INDEX).exists()
    one, many = (load_rank(folder, 1, 3)[0].state_dict() for folder in (folders["qwen3"], tmp_path))
    assert one.keys() == many.keys() and all(torch.equal(one[key], many[key]) for key in one)


def test_slices_are_cast_one_by_one(folders, taken):
    decoder, _ = load_rank(folders["llama3.2-tied"], 0, 2, dtype=torch.bfloat16)
    whole = load_file(folders["llama3.2-tied"] / SINGLE)
    assert torch.equal(decoder.layers[1].mlp.down_proj.weight, whole["model.layers.1.mlp.down_proj.weight"][:, :51].bfloat16())
    largest = max(parameter.nbytes for parameter in decoder.parameters())
    assert max(count for _, count in taken) <= 2 * largest                          # fp32 slice of a bf16 parameter


def anonymous_memory():
    """Bytes of this process that are its own, mapped files apart."""
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_grows_by_the_ranks_share(tmp_path):
    """A checkpoint of 73 MB in fp32, of which one rank of four keeps its quarter, cast to bfloat16; watched after every slice."""
    keys = {"architectures": ["LlamaForCausalLM"], "vocab_size": 4000, "hidden_size": 512, "intermediate_size": 2048,
            "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    shards = make_decoder(tmp_path).shards(set())
    save_file({shard.name: torch.ones(shard.shape) for shard in shards}, tmp_path / SINGLE)
    before, peak = anonymous_memory(), 0

    def watch(done, total):
        nonlocal peak
        peak = max(peak, anonymous_memory() - before)

    decoder = load_model(tmp_path, "cpu", communicator=OneRank(0, 4), dtype="bfloat16", progress=watch)
    held = sum(parameter.nbytes for parameter in decoder.parameters())
    whole = (tmp_path / SINGLE).stat().st_size
    assert whole > 70e6 and held < whole / 7
    assert peak < held + 6e6 < whole / 4


def test_progress_counts_bytes_to_the_end(folders, monkeypatch):
    calls = []
    monkeypatch.setattr(load, "make_schedule", lambda *_: Schedule())               # what rank 0 would say is not there
    decoder = load_model(folders["gemma2"], "cpu", communicator=OneRank(1, 2), progress=lambda *call: calls.append(call))
    done, totals = zip(*calls)
    held = {parameter.data_ptr(): parameter.nbytes for parameter in decoder.parameters()}
    assert set(totals) == {sum(held.values())} and done[0] == 0 and done[-1] == totals[0]
    assert list(done) == sorted(done) and len(done) > 20


def test_unused_tensors_are_told(folders, broken, caplog):
    tensors = load_file(broken / SINGLE)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(120)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(10)
    save_file(tensors, broken / SINGLE)
    load_model(broken, "cpu", communicator=OneRank(0, 2))
    assert [record.getMessage() for record in caplog.records if "not used" in record.getMessage()] == [
        f"{broken}: 1 tensors belong to nothing in this architecture and are not used, for example model.layers.0.self_attn.q_proj.bias"]


# ---- broken checkpoints: what is done to the copy, and what the one line must say ----

def truncate(folder):
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:-1000])


def cut_header(folder):
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:200])


def garble_header(folder):
    content = bytearray((folder / SINGLE).read_bytes())
    content[8:40] = b"\xff" * 32
    (folder / SINGLE).write_bytes(content)


def empty(folder):
    (folder / SINGLE).write_bytes(b"")


def html(folder):
    (folder / SINGLE).write_text("<html>404: not found</html>" * 20)


def lengthen(folder):
    with open(folder / SINGLE, "ab") as file:
        file.write(b"\0" * 64)


def deep_header(folder):
    (folder / SINGLE).write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000)


def odd_dtype(folder):
    header = json.dumps({"model.norm.weight": {"dtype": ["F32"], "shape": [0], "data_offsets": [0, 0]}}).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header)


def odd_header(folder):
    header = json.dumps({"model.norm.weight": {"dtype": "F32"}}).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header)


def overlap(folder):
    """A header that sums up but lies about an offset, which only the format's own reader sees."""
    content = (folder / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8:8 + length])
    key = next(name for name in header if name.endswith("q_norm.weight"))
    begin, end = header[key]["data_offsets"]
    header[key]["data_offsets"] = [begin + 4, end]
    text = json.dumps(header).encode().ljust(length)
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length:])


def change(key, value):
    def apply(folder):
        tensors = load_file(folder / SINGLE)
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value(tensors[key])
        save_file(tensors, folder / SINGLE)
    return apply


def only_pickle(folder):
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def index_without_file(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))


def index_with_a_lie(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": SINGLE, "lost.weight": SINGLE}}))


def index_outside(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}))


def index_garbage(folder):
    (folder / INDEX).write_text("[1, 2")


def index_deep(folder):
    (folder / INDEX).write_text("[" * 200_000)


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
BROKEN = [
    (truncate, r"model.safetensors is truncated: \d+ bytes, its header describes \d+; fetch the file again"),
    (cut_header, "is not a whole safetensors file .* header cut off"),
    (garble_header, "has a corrupt safetensors header"),
    (empty, r"not a whole safetensors file \(0 bytes"),
    (html, "not a whole safetensors file"),
    (lengthen, "is longer than it should be"),
    (deep_header, "corrupt safetensors header .RecursionError"),
    (odd_dtype, "model.safetensors cannot be read: .*; fetch the file again"),
    (odd_header, "corrupt safetensors header .*shape"),
    (overlap, "model.safetensors cannot be read: .*; fetch the file again"),
    (change(Q_PROJ, None), f"lacks {Q_PROJ}, which its config.json asks for"),
    (change(Q_PROJ, lambda t: t[:-20].clone()), rf"{Q_PROJ} has shape \[100, 48\], config.json asks for \[120, 48\]"),
    (change(Q_PROJ, lambda t: t.to(torch.int8)), f"{Q_PROJ} is I8, expected one of F64, F32, F16, BF16; quantized"),
    (change(Q_PROJ, lambda t: t.to(torch.float8_e4m3fn)), f"{Q_PROJ} is F8_E4M3, expected"),
    (only_pickle, "has no model.safetensors .pytorch_model.bin is a pickle: convert it"),
    (index_without_file, "model-00001-of-00002.safetensors does not exist, and the checkpoint needs it"),
    (index_with_a_lie, "promises lost.weight, which model.safetensors does not hold"),
    (index_outside, "index.json is corrupt: expected a JSON object with weight_map"),
    (index_garbage, "index.json is corrupt"),
    (index_deep, "index.json is corrupt"),
]


@pytest.mark.parametrize("harm, message", BROKEN, ids=[getattr(harm, "__name__", "change") for harm, _ in BROKEN])
def test_a_broken_checkpoint_is_one_clear_line(broken, harm, message):
    harm(broken)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(broken, "cpu", communicator=OneRank(0, 1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("harm, message", [
    (change("model.embed_tokens.weight", None), "lacks model.embed_tokens.weight"),
    (overlap, "cannot be read"),
], ids=["missing", "overlap"])
def test_a_fault_in_another_ranks_part_stops_this_one_too(broken, harm, message):
    """Under 'master' rank 1 never reads the embedding; it must not go on and wait for a rank 0 that has stopped."""
    harm(broken)
    with pytest.raises(ModelError, match=message):
        load_model(broken, "cpu", communicator=OneRank(1, 2), vocabulary="master")


def test_a_config_larger_than_memory_is_told_by_shape(broken):
    """The shapes are compared before anything is allocated."""
    keys = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**keys, "intermediate_size": 2**31 - 1}))
    with pytest.raises(ModelError, match=r"gate_proj.weight has shape \[101, 48\], config.json asks for \[2147483647, 48\]"):
        load_model(broken, "cpu", communicator=OneRank(0, 1))


def test_several_missing_tensors_are_counted(broken):
    tensors = {key: tensor for key, tensor in load_file(broken / SINGLE).items() if ".layers.0." not in key}
    save_file(tensors, broken / SINGLE)
    with pytest.raises(ModelError, match=r"lacks model.layers.0.input_layernorm.weight and 10 more tensors"):
        load_model(broken, "cpu", communicator=OneRank(0, 1))


def test_no_model_at_all(tmp_path):
    with pytest.raises(ModelError, match=r"model directory .* does not exist"):
        load_model(tmp_path / "absent", "cpu", communicator=OneRank(0, 1))
    with pytest.raises(ModelError, match=r"config.json does not exist"):
        load_model(tmp_path, "cpu", communicator=OneRank(0, 1))


def test_more_ranks_than_query_heads(folders):
    with pytest.raises(ModelError, match="tensor parallel size 7 is not possible for a model of 6 query heads; sizes that work: 1 to 6"):
        load_model(folders["qwen3"], "cpu", communicator=OneRank(0, 7))


def test_dtype_of_a_config_that_does_not_say(broken):
    keys = json.loads((broken / "config.json").read_text())
    del keys["dtype"]
    (broken / "config.json").write_text(json.dumps(keys))
    tensors = load_file(broken / SINGLE)
    save_file({key: tensor.half() for key, tensor in tensors.items()}, broken / SINGLE)
    profile = load_profile("cpu", sets=["dtype=auto"])
    assert load_model(broken, profile, communicator=OneRank(0, 1)).dtype == torch.float16
