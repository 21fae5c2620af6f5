"""The committed checkpoint examples/tiny-llama: it is whole, small, says the truth about itself, and still predicts Python.

Its numbers were measured when it was trained; here transformers, which the decoder is also checked against, measures a part of them again,
on the held-out files of the running Python. A file that differs between Python versions is compared by bits a byte, and loosely.
"""
import json
import math
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"
CHECKPOINT = EXAMPLES / "tiny-llama"
FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json", "README.md",
)


def read_json(name):
    return json.loads((CHECKPOINT / name).read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
    return transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", FILES)
def test_file_is_there(name):
    assert (CHECKPOINT / name).stat().st_size > 0


def test_weights_are_small_whole_and_fit_the_config():
    config = read_json("config.json")
    hidden, ffn, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_rows, kv_rows = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    expected = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    for layer in range(config["num_hidden_layers"]):
        block = {"self_attn.q_proj": [q_rows, hidden], "self_attn.k_proj": [kv_rows, hidden], "self_attn.v_proj": [kv_rows, hidden],
                 "self_attn.o_proj": [hidden, q_rows], "mlp.gate_proj": [ffn, hidden], "mlp.up_proj": [ffn, hidden],
                 "mlp.down_proj": [hidden, ffn], "input_layernorm": [hidden], "post_attention_layernorm": [hidden]}
        expected |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}

    path = CHECKPOINT / "model.safetensors"
    assert path.stat().st_size <= 8_000_000
    with safe_open(path, "pt") as weights:
        assert {name: weights.get_slice(name).get_shape() for name in weights.keys()} == expected      # no lm_head: it is tied
        for name in expected:
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.bfloat16 and tensor.isfinite().all(), name
    assert config["tie_word_embeddings"] and config["architectures"] == ["LlamaForCausalLM"]


def test_tokenizer_agrees_with_the_configs(tokenizer):
    config, facts, generation = read_json("config.json"), read_json("tokenizer_config.json"), read_json("generation_config.json")
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id(facts["bos_token"]) == config["bos_token_id"] == generation["bos_token_id"]
    assert tokenizer.token_to_id(facts["eos_token"]) == config["eos_token_id"] == generation["eos_token_id"]
    assert tokenizer.encode("x = 1\n").ids[0] == config["bos_token_id"]


@pytest.mark.parametrize("text", [
    Path(json.__file__).read_text(), "def f(x):\n\treturn x\r\n", "s = 'naïve 日本 🙂'  # é\n", "   \n\n\n  a  b   c \n", "\x00\x7f", ""])
def test_tokenizer_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_indentation_is_one_token_and_newlines_stand_alone(tokenizer):
    assert tokenizer.encode("if a:\n        return b\n\n", add_special_tokens=False).tokens == [
        "if", "Ġa", ":", "Ċ", "Ġ" * 8, "return", "Ġb", "Ċ", "Ċ"]


def test_chat_template_makes_comments_of_the_user():
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Template(read_json("tokenizer_config.json")["chat_template"], keep_trailing_newline=True)
    chat = [{"role": "user", "content": "Add two\nnumbers."}, {"role": "assistant", "content": "def add(a, b):"}]
    assert template.render(messages=chat, bos_token="<|begin|>") == "<|begin|># Add two\n# numbers.\ndef add(a, b):\n"


def test_readme_says_what_was_measured():
    record, readme = read_json("training.json"), (CHECKPOINT / "README.md").read_text()
    held_out = record["held_out"]
    for fact in (record["command"], record["date"], str(held_out["loss"]), str(held_out["perplexity"]), str(held_out["bits_per_byte"])):
        assert fact in readme, f"README.md does not say {fact}"
    assert math.exp(held_out["loss"]) == pytest.approx(held_out["perplexity"], rel=1e-3)
    assert record["curve"][-1]["held_out"] < record["curve"][0]["held_out"] - 0.5


@torch.no_grad()
def nats(model, tokenizer, text, window):
    """(sum of losses in nats, tokens) of a text by transformers' own loss, in windows that share one token."""
    ids, total = torch.tensor(tokenizer.encode(text).ids), 0.0
    for start in range(0, len(ids) - 1, window):
        part = ids[None, start:start + window + 1]                                         # [1, window + 1]
        total += model(input_ids=part, labels=part).loss.item() * (part.shape[1] - 1)
    return total, len(ids) - 1


def test_held_out_loss_is_what_training_recorded(model, tokenizer, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from tiny_corpus import read_corpus
    held_out, recorded = read_corpus()[1], read_json("training.json")["held_out"]
    same = {row["file"]: row for row in recorded["files"]}
    total, size, budget = 0.0, 0, 15_000
    for name, text in held_out:
        raw = text.encode()
        if len(raw) > budget:                              # bytes: a few short files keep this within seconds
            continue
        budget -= len(raw)
        loss, tokens = nats(model, tokenizer, text, recorded["window"])
        total, size = total + loss, size + len(raw)
        if same.get(name, {}).get("sha256") == sha256(raw).hexdigest():
            assert tokens == same[name]["tokens"] and loss / tokens == pytest.approx(same[name]["loss"], abs=0.01), name
    assert size > 2_000, "this Python has no held-out files to measure on"
    assert total / math.log(2) / size == pytest.approx(recorded["bits_per_byte"], rel=0.35)


def test_weights_matter_to_the_loss(model, tokenizer):
    """Negative control for the test above: one block's attention silenced must show."""
    text = "import os\n\n\ndef main(argv=None):\n    if argv is None:\n        argv = sys.argv[1:]\n    return 0\n" * 2
    good, tokens = nats(model, tokenizer, text, 512)
    projection = model.model.layers[0].self_attn.o_proj.weight
    kept = projection.detach().clone()
    try:
        projection.data.zero_()
        broken, _ = nats(model, tokenizer, text, 512)
    finally:
        projection.data.copy_(kept)
    assert broken / tokens > good / tokens + 0.1
