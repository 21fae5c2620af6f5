"""hetero-attn build: what it makes, shows and refuses; one kernel that fails does not stop the others."""

import json
from pathlib import Path

import pytest
from native import needs_compiler, tiny_kernel, write_sources

from hetero_attn import registry
from hetero_attn.backend import Backend
from hetero_attn.cli import main

pytestmark = needs_compiler


class Declares(Backend):
    """Kernels for two instruction sets, of which this machine uses 'here'."""

    name = "declares"

    def __init__(self, root):
        self.root = root

    def kernels(self):
        return [tiny_kernel(self.root, name="tiny-here", arch="here"),
                tiny_kernel(self.root, name="tiny-other", arch="other", flags=["-DOTHER"], used_here=False)]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HETERO_ATTN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """Sources of a backend that is the only one on this machine: the real ones would take their time."""
    root = write_sources(tmp_path / "csrc")
    monkeypatch.setattr(registry, "_found", dict)
    with registry.register("declares", lambda: Declares(root)):
        yield root


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["build", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_it_builds_what_this_machine_uses_and_then_finds_it(capsys, root, cache):
    code, out, err = run(capsys)
    assert (code, err) == (0, "") and out.count("\n") == 1
    words = out.split()
    assert words[:4] == ["tiny-here", "here", "built", "in"] and words[5] == "s"
    assert Path(words[6]).is_file() and Path(words[6]).is_relative_to(cache)
    code, out, _ = run(capsys)
    assert code == 0 and out.split()[:3] == ["tiny-here", "here", "cached"]
    assert "built in" in run(capsys, "--force")[1]


def test_the_list_builds_nothing(capsys, root, cache):
    run(capsys)
    code, out, _ = run(capsys, "--list")
    assert code == 0
    assert [line.split()[:3] for line in out.splitlines()] == [["tiny-here", "here", "cached"], ["tiny-other", "other", "missing"]]
    assert "not used on this machine" in out.splitlines()[1] and not (cache / "tiny-other").exists()


def test_arch_selects(capsys, root, cache):
    assert [line.split()[0] for line in run(capsys, "--arch", "other")[1].splitlines()] == ["tiny-other"]
    assert [line.split()[2] for line in run(capsys, "--arch", "all")[1].splitlines()] == ["built", "cached"]
    code, out, err = run(capsys, "--arch", "otter")
    assert (code, out) == (2, "") and "--arch is 'otter', expected all, here, other" in err and err.count("\n") == 1


def test_json_into_a_folder(capsys, root, cache, tmp_path):
    code, out, err = run(capsys, "--arch", "all", "--into", tmp_path / "into", "--json")
    report = json.loads(out)
    assert (code, err) == (0, "") and report["compiler_reason"] is None
    assert [(row["backend"], row["name"], row["state"]) for row in report["kernels"]] == [
        ("declares", "tiny-here", "built"), ("declares", "tiny-other", "built")]
    for row in report["kernels"]:
        assert Path(row["path"]).is_relative_to(tmp_path / "into") and row["seconds"] > 0
        assert Path(row["path"]).with_name(row["digest"] + ".json").is_file()
    assert not cache.exists()


def test_a_kernel_that_fails_does_not_stop_the_others(capsys, root, cache):
    (root / "tiny.cpp").write_text('#ifndef OTHER\n#error only for the other\n#endif\nextern "C" int answer() { return 1; }\n')
    code, out, err = run(capsys, "--arch", "all")
    assert code == 1
    assert [line.split()[2] for line in out.splitlines()] == ["failed", "built"]
    assert "only for the other" in err and "command: " in err                          # all of the compiler's words
    last = err.splitlines()[-1]
    assert last == ("hetero-attn: error: 1 of 2 native kernels could not be built: "
                    "kernel tiny-here: compiling tiny.cpp failed with exit code 1")


def test_no_compiler(capsys, root, cache, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = run(capsys)
    assert code == 1 and "no C++ compiler: none of g++, c++, clang++ is on PATH; install one" in err and err.count("\n") == 1


def test_a_cache_that_cannot_be_written(capsys, root, monkeypatch):
    monkeypatch.setenv("HETERO_ATTN_CACHE_DIR", "/dev/null/cache")
    code, _, err = run(capsys)
    assert code == 1 and "/dev/null/cache" in err and "set HETERO_ATTN_CACHE_DIR" in err and err.count("\n") == 1


def test_an_object_that_does_not_load_here_is_told(capsys, root, cache):
    (root / "tiny.cpp").write_text('extern "C" int absent();\nextern "C" int answer() { return absent(); }\n')
    code, out, err = run(capsys, "--arch", "here")
    assert code == 1 and "failed" in out and "does not load" in err and "absent" in err


def test_force_and_list_exclude_each_other(capsys, root, cache):
    code, _, err = run(capsys, "--force", "--list")
    assert code == 2 and "not allowed with" in err


def test_nothing_declared(capsys, cache, monkeypatch):
    monkeypatch.setattr(registry, "_found", dict)
    assert run(capsys) == (0, "no backend declares a native kernel\n", "")


def test_a_backend_that_cannot_declare_is_told(capsys, root, cache):
    class Broken(Backend):
        def kernels(self):
            raise OSError("no answer")

    with registry.register("broken", Broken):
        code, out, err = run(capsys)
    assert code == 0 and "tiny-here" in out and "broken: its kernels() failed: OSError: no answer" in err


@pytest.mark.parametrize("words", [["--list"], []])
def test_a_mistyped_instruction_set_is_what_is_told(capsys, cache, monkeypatch, words):
    monkeypatch.setenv("HETERO_ATTN_CPU_INSTRUCTION_SET", "avx3")
    code, out, err = run(capsys, "--backend", "cpu", *words)
    assert (code, out) == (1, "") and "HETERO_ATTN_CPU_INSTRUCTION_SET" in err and "avx3" in err
