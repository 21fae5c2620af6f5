"""The generate command as its users meet it: what is on stdout and stderr, exit codes, one line for every mistake.

What needs real processes is in test_cli_generate_ranks.py.
"""

import io
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import byte_fallback, byte_level, write_checkpoint, write_tokenizer

from hetero_attn import registry
from hetero_attn.cli import main, work
from hetero_attn.cli.output import TextPrinter
from hetero_attn.cli.progress import ByteProgress, size
from hetero_attn.communicator import SoloCommunicator
from hetero_attn.models.generate import Generation, Piece, generate
from hetero_attn.models.load import load_model
from hetero_attn.models.sampling import SamplingParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def texts(folder):
    """The text of prompts, from the library."""
    model = load_model(folder, "cpu", communicator=SoloCommunicator())

    def of(*prompts, **params):
        return [result.text for result in generate(model, prompts, SamplingParams(**{"max_new_tokens": 12} | params))]

    return of


@pytest.fixture
def run(folder, capsys):
    """Runs `generate FOLDER ARGS --max-new-tokens 12` in this process: (exit code, stdout, stderr)."""
    def command(*args, model=folder):
        code = main(["generate", str(model), "--max-new-tokens", "12", *map(str, args)])
        out, err = capsys.readouterr()
        return code, out, err

    return command


def whole(text):
    return text if text.endswith("\n") else text + "\n"


def test_text_on_stdout_and_everything_else_on_stderr(run, texts):
    (text,) = texts("Hello")
    code, out, err = run("--prompt", "Hello")
    assert (code, out) == (0, whole(text))
    assert "loading weights: " in err and "12 tokens, first token after" in err and "tokens/s" in err
    assert run("--prompt", "Hello", "--no-stream")[1] == out
    assert run("--prompt", "Hello", "--echo")[1] == "Hello" + out
    code, _, err = run("--prompt", "Hello", "--echo", "--json")
    assert code == 2 and "leave it out with --json" in err


def test_several_prompts_come_in_order_under_headings(run, texts, tmp_path):
    (tmp_path / "prompt.txt").write_text("naïve\n", encoding="utf-8")
    code, out, _ = run("--prompt", "Hello", "--prompt-file", tmp_path / "prompt.txt", "--prompt", "def")
    expected = "".join(f"==> prompt {number} <==\n{whole(text)}" for number, text in enumerate(texts("Hello", "naïve\n", "def"), start=1))
    assert (code, out) == (0, expected)


@pytest.mark.parametrize("args", [["-"], ["--prompt-file", "-"]])
def test_a_prompt_from_standard_input(run, texts, monkeypatch, args):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Hello 東京".encode())))
    assert run(*args)[1] == whole(*texts("Hello 東京"))


def test_json_is_one_object_and_the_flags_arrive(run, texts, folder):
    sampled = {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 5}
    args = [part for name, value in sampled.items() for part in (f"--{name.replace('_', '-')}", value)]
    code, out, _ = run("--prompt", "Hello", "--prompt", "def", "--json", "--set", "prefill_chunk=3", "--dtype", "float32", *args)
    facts = json.loads(out)
    first = "cpu" if not registry.get("cpu").unavailable_reasons() else "sdpa"               # where there is no compiler
    assert code == 0 and out.count("\n") == 1
    assert [result["text"] for result in facts["results"]] == texts("Hello", "def", **sampled)
    assert {name: facts[name] for name in ("profile", "backend", "tp", "dtype", "device", "vocabulary", "seed", "tokens")} == {
        "profile": "cpu", "backend": first, "tp": 1, "dtype": "float32", "device": "cpu", "vocabulary": "sharded", "seed": 5, "tokens": 24}
    for result in facts["results"]:
        assert result["finish_reason"] == "length" and len(result["token_ids"]) == 12 and 0 < result["first_token_s"] <= result["total_s"]
        assert result["prefill_tokens_per_s"] == result["prompt_tokens"] / result["first_token_s"]
    slowest = max(result["first_token_s"] for result in facts["results"])
    assert facts["prefill_tokens_per_s"] == sum(result["prompt_tokens"] for result in facts["results"]) / slowest
    assert facts["first_token_s"] <= slowest and facts["codec"] is None
    (text,) = texts("Hello")
    stopped = json.loads(run("--prompt", "Hello", "--json", "--stop", "never there", "--stop", text[2:5])[1])["results"][0]
    assert (stopped["text"], stopped["finish_reason"]) == (text[: text.index(text[2:5])], "stop")
    assert json.loads(run("--prompt", "Hello", "--json", "--backend", "reference")[1])["backend"] == "reference"


def test_chat_renders_the_template_and_a_pipe_is_one_turn_a_line(run, texts, monkeypatch):
    def rendered(*turns):
        return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"

    def tokens(*turns):
        return byte_level().encode(rendered(*turns), add_special_tokens=False).ids

    expected = texts(tokens(("system", "be brief"), ("user", "hi")), tokens(("system", "be brief"), ("user", "you?")))
    single = json.loads(run("--chat", "--system", "be brief", "--prompt", "hi", "--prompt", "you?", "--json")[1])
    assert [result["text"] for result in single["results"]] == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\n/reset\nyou?\n/exit\nnot reached\n"))
    code, out, _ = run("--chat", "--system", "be brief")
    assert (code, out) == (0, "".join(map(whole, expected)))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nyou?"))
    talk = json.loads(run("--chat", "--system", "be brief", "--json")[1])["results"]
    assert talk[0]["text"] == expected[0] and talk[1]["text"] != expected[1] and talk[1]["prompt_tokens"] > talk[0]["prompt_tokens"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n" + "x" * 200 + "\n"))
    code, _, err = run("--chat")
    assert code == 2 and "longer than the model's context of 128" in err.splitlines()[-1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\n"), encoding="ascii"))
    code, out, err = run("--chat")
    assert (code, out) == (2, "") and err.splitlines()[-1] == "hetero-attn: error: standard input is not UTF-8 text (a byte is 0xff)"


def spoiled(folder, target, change):
    shutil.copytree(folder, target)
    change(target)
    return target


def rewrite(name, change):
    def apply(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))
    return apply


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def integers(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, folder / "model.safetensors")


def not_numbers(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}, folder / "model.safetensors")


FOLDERS = {
    "truncated": (cut, "model.safetensors is truncated"),
    "corrupt": (lambda f: (f / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"not json at all!"), "corrupt safetensors header"),
    "cut header": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 20), "not a whole safetensors file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "integers": (integers, "is I8, expected one of"),
    "dtype": (rewrite("config.json", lambda c: c.update(dtype="int8", torch_dtype="int8")), "dtype 'int8' is not supported"),
    "architecture": (rewrite("config.json", lambda c: c.update(architectures=["MambaForCausalLM"])), "unknown architecture Mamba"),
    "config": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    "sampling": (rewrite("generation_config.json", lambda c: c.update(do_sample=True, top_p=7)), "generation_config.json: top_p is 7"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"), "no tokenizer.json (only tokenizer.model)"),
    "other tokenizer": (lambda f: write_tokenizer(f, byte_fallback()), "is this the tokenizer of another model?"),
}


@pytest.fixture
def refused(run, monkeypatch):
    """Asserts that a command is refused with one line that holds `words`, with one rank and with two, none of which is started."""
    monkeypatch.setattr(work, "run_ranks", lambda *a, **k: pytest.fail("ranks were started"))
    monkeypatch.setattr(work, "init_communicator", lambda *a, **k: pytest.fail("the work began"))

    def check(words, *args, **options):
        for tp in ([], ["--tp", 2]) if "--tp" not in args else ([],):
            code, out, err = run(*args, *tp, **options)
            assert (code, out) == (2, "")
            assert err.startswith("hetero-attn: error: ") and err.count("\n") == 1 and words in err, err

    return check


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_bad_model_directory_is_one_line(refused, folder, tmp_path, kind):
    change, words = FOLDERS[kind]
    refused(words, "--prompt", "Hello world", model=spoiled(folder, tmp_path / "model", change))


@pytest.mark.parametrize(("args", "words"), [
    ([], "no prompt: give --prompt TEXT"),
    (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0, expected a finite number of at least 0"),
    (["--prompt", "a", "--top-p", "0"], "top_p is 0.0, expected above 0"),
    (["--prompt", "a", "--stop", ""], "stop is"),
    (["--prompt", "a", "--top-k", "many"], "argument --top-k: invalid int value: 'many'"),
    (["--prompt", "a", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    (["--prompt", "a", "--max-tokens", "4"], "did you mean --max-new-tokens? (see hetero-attn generate --help)"),
    (["--prompt", "a", "--tp", "7"], "tensor parallel size 7 is not possible for a model of 6 query heads; sizes that work: 1 to 6"),
    (["--prompt", "a", "--tp", "0"], "--tp is 0, expected at least 1"),
    (["--prompt", "a", "--set", "kv_blok_size=3"], "unknown key kv_blok_size; did you mean kv_block_size?"),
    (["--prompt", "a", "--set", "kv_block_size=0"], "kv_block_size is 0"),
    (["--prompt", "a", "--profile", "v10"], "unknown profile 'v10'"),
    (["--prompt", "a", "--profile", "none.yaml"], "none.yaml does not exist"),
    (["--prompt", "a", "--backend", "sdqa"], "unknown backend 'sdqa': did you mean 'sdpa'?"),
    (["--prompt", "a", "--dtype", "int4"], "argument --dtype: invalid choice: 'int4'"),
    (["--prompt", "a", "--device", "gpu"], "device 'gpu'"),
    (["--prompt", "a", "--timeout", "-3"], "--timeout is -3, expected seconds: above 0, at most 1000000"),
    (["--prompt", "a", "--timeout", "1e20"], "--timeout is 1e+20, expected seconds"),
    (["--prompt", "a\udcff"], "which is not Unicode text"),
    (["--prompt", "a", "--system", "b"], "give --chat too"),
    (["--prompt", "x" * 300], "the prompt has 301 tokens, longer than the model's context of 128"),
    (["--prompt", "a", "--prompt", "x" * 300], "prompt 2 of 2 has 301 tokens"),
    (["--chat", "--prompt", "x" * 300], "longer than the model's context of 128"),
    (["--prompt-file", "no-such-file"], "prompt file no-such-file cannot be read: No such file or directory"),
    (["--prompt-file", "/"], "prompt file / cannot be read"),
    (["--prompt-file", sys.executable], "is not UTF-8 text (byte "),
    (["-", "--prompt-file", "-"], "standard input (-) is asked for twice"),
])
def test_a_bad_argument_is_one_line(refused, args, words):
    refused(words, *args)


def test_further_refusals(refused, folder, tmp_path, monkeypatch, capsys):
    refused("model directory", "--prompt", "a", model=tmp_path / "absent")
    plain = spoiled(folder, tmp_path / "plain", lambda f: write_tokenizer(f, chat_template=None))
    refused("no chat template", "--chat", "--prompt", "a", model=plain)
    refused("no chat template", "--chat", model=tmp_path / "plain")

    def nowhere_to_start(f):
        write_tokenizer(f, bos_token=None)
        rewrite("tokenizer.json", lambda c: c.update(post_processor=None))(f)
        rewrite("config.json", lambda c: c.update(bos_token_id=None))(f)
        rewrite("generation_config.json", lambda c: c.pop("bos_token_id"))(f)

    refused("the prompt is empty", "--prompt", "", model=spoiled(folder, tmp_path / "no-bos", nowhere_to_start))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("--tp is 3, but torchrun started 2 ranks", "--prompt", "a", "--tp", 3)
    monkeypatch.setenv("RANK", "2")
    refused("RANK is '2' and WORLD_SIZE '2' in the environment, expected numbers with 0 <= RANK < WORLD_SIZE", "--prompt", "a")
    assert main([]) == 2 and main(["sing"]) == 2
    assert [line[:20] for line in capsys.readouterr().err.splitlines()] == ["hetero-attn: error: "] * 2


def test_a_very_short_timeout_is_a_number(run):
    assert run("--prompt", "a", "--timeout", "1e-5")[0] == 0


def test_a_traceback_only_on_request(run, monkeypatch, folder, tmp_path):
    monkeypatch.setenv("HETERO_ATTN_DEBUG", "1")
    assert "Traceback" in run()[2]
    monkeypatch.setenv("HETERO_ATTN_DEBUG", "0")
    assert "Traceback" not in run()[2]
    nan = spoiled(folder, tmp_path / "nan", not_numbers)
    code, out, err = run("--prompt", "a", model=nan)
    assert (code, out) == (1, "") and err.splitlines()[-1].startswith("hetero-attn: error: the logits' maximum is nan: ")
    assert "this is a bug" not in err
    monkeypatch.setattr(work, "load_model", lambda *a, **k: 1 / 0)          # a bug of ours: still one line, but not the caller's fault
    code, _, err = run("--prompt", "a")
    assert code == 1 and err.startswith("hetero-attn: error: ZeroDivisionError: division by zero (this is a bug;") and err.count("\n") == 1
    monkeypatch.setattr(work, "load_model", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert run("--prompt", "a") == (130, "", "")


def test_pieces_of_later_prompts_wait_for_their_turn():
    out = io.StringIO()
    printer = TextPrinter(2, file=out)
    done = Generation(0, "", (), "length", 0, 0, 0, 0)
    printer(Piece(1, "second"))
    printer(Piece(0, "fir"))
    assert out.getvalue() == "==> prompt 1 <==\nfir"
    printer(Piece(1, "!", done))
    printer(Piece(0, "st\n", done))
    assert out.getvalue() == "==> prompt 1 <==\nfirst\n==> prompt 2 <==\nsecond!\n"
    late = io.StringIO()
    printer = TextPrinter(1, stream=False, file=late)
    printer(Piece(0, "a"))
    assert late.getvalue() == ""
    printer(Piece(0, "b", done))
    assert late.getvalue() == "ab\n"


def test_a_bar_on_a_terminal_and_a_plain_line_elsewhere():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert [size(count) for count in (0, 999, 1000, 8_130_000, 140e9)] == ["0 B", "999 B", "1.0 kB", "8.1 MB", "140 GB"]
    for stream, bar, drawn in ((Terminal(), None, True), (io.StringIO(), None, False), (io.StringIO(), True, True)):
        progress = ByteProgress("loading", bar=bar, stream=stream)
        for done in (0, 500_000, 2_000_000):
            progress(done, 2_000_000)
        text = stream.getvalue()
        assert text.endswith("\n") and text.count("\n") == 1 and ("[###" in text and "\r" in text) == drawn and "2.0 MB" in text
    progress = ByteProgress("loading", bar=True, stream=io.StringIO())
    progress(0, 0)                                                                   # a rank may have nothing to read
