"""Native kernels are compiled once, by whatever compiler there is, and anew when anything that they are made from changes."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from native import DiaryCompiler, needs_compiler, tiny_kernel, write_sources

from hetero_attn import artifacts
from hetero_attn.jit import BuildError, Kernel, compiler_reason

ROOT = Path(__file__).parents[1]
pytestmark = needs_compiler


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HETERO_ATTN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path) -> Path:
    return write_sources(tmp_path / "csrc")


@pytest.fixture
def diary(tmp_path, monkeypatch) -> DiaryCompiler:
    compiler = DiaryCompiler(tmp_path)
    monkeypatch.setenv("CXX", str(compiler.path))
    return compiler


def without_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def in_a_process(root: Path, go: Path) -> subprocess.Popen:
    """A process that says 'ready', waits for the file `go`, and loads the kernel."""
    program = (
        "import time, pathlib; from native import tiny_kernel\n"
        f"kernel, go = tiny_kernel(pathlib.Path({str(root)!r})), pathlib.Path({str(go)!r})\n"
        "print('ready', flush=True)\n"
        "while not go.exists(): time.sleep(0.002)\n"
        "print(kernel.load().answer(), flush=True)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}:{ROOT / 'tests'}"}
    return subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(condition, what: str, limit_s: float = 60):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {limit_s} s"
        time.sleep(0.01)


def test_compiled_once_and_found_again(root, cache, diary):
    kernel, steps = tiny_kernel(root), []
    assert kernel.try_load() is None and diary.steps() == []
    assert kernel.build(progress=steps.append).parent == cache / "tiny"
    assert steps == ["tiny: compiling tiny.cpp", "tiny: linking"]
    assert kernel.try_load().answer() == 42 and kernel.load().answer() == 42
    assert diary.steps() == ["compile", "link"]
    kernel.build(force=True)
    assert diary.steps() == ["compile", "link"] * 2
    assert not list((cache / "tiny").glob("making-*"))


def test_two_processes_at_once_compile_once(root, cache, diary, tmp_path):
    go = tmp_path / "go"
    diary.held.touch()
    both = [in_a_process(root, go) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    go.touch()
    wait_for(lambda: diary.steps(), "a compiler starts")
    time.sleep(0.3)                                      # the other one has come to the lock, and not to the compiler
    diary.held.unlink()
    assert [process.communicate(timeout=60)[0] for process in both] == ["42\n"] * 2
    assert diary.steps() == ["compile", "link"]


def test_a_killed_builder_leaves_things_usable(root, cache, diary, tmp_path):
    go = tmp_path / "go"
    go.touch()
    diary.held.touch()
    process = in_a_process(root, go)
    wait_for(lambda: diary.steps(), "a compiler starts")
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=10)
    assert list((cache / "tiny").glob("making-*"))       # what it left
    try:
        kernel = tiny_kernel(root)
        assert kernel.try_load() is None
        diary.held.unlink()
        assert kernel.load().answer() == 42
        assert not list((cache / "tiny").glob("making-*"))
    finally:
        process.stdout.close()


def test_a_lock_that_nobody_gives_back_is_named(root, cache, diary, monkeypatch):
    monkeypatch.setattr(artifacts, "LOCK_WAIT_S", 0.1)
    (cache / "tiny").mkdir(parents=True)
    steps = []
    with open(cache / "tiny" / "made.lock", "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BuildError, match=r"another process has held .*made\.lock for 0\.1 s"):
            tiny_kernel(root).build(progress=steps.append)
    assert steps == ["waiting for another process that makes tiny"] and diary.steps() == []


def test_a_compile_error_gives_the_compilers_words(root, cache):
    (root / "tiny.cpp").write_text("int answer() { return undeclared_name; }\n")
    with pytest.raises(BuildError) as caught:
        tiny_kernel(root).load()
    text = str(caught.value)
    for wanted in ("kernel tiny: compiling tiny.cpp failed with exit code 1", "command: ", "-std=c++17", "undeclared_name",
                   "hetero-attn build"):
        assert wanted in text
    assert "undeclared_name" in caught.value.output
    assert not list((cache / "tiny").glob("*.so")) and not list((cache / "tiny").glob("*.json"))


def test_a_link_error_too(root, cache):
    with pytest.raises(BuildError, match="kernel tiny: linking failed") as caught:
        tiny_kernel(root, link_flags=["-lno_such_library"]).load()
    assert "no_such_library" in caught.value.output


def test_several_sources_and_flags(root, cache):
    (root / "more.cpp").write_text('extern "C" __attribute__((visibility("default"))) int more() { return MORE; }\n')
    library = tiny_kernel(root, sources=["tiny.cpp", "more.cpp"], flags=["-DMORE=7"]).load()
    assert (library.answer(), library.more()) == (42, 7)


def test_no_compiler_is_a_reason(root, cache, monkeypatch, tmp_path):
    without_compiler(monkeypatch, tmp_path)
    assert "none of g++, c++, clang++ is on PATH" in compiler_reason() and "apt install g++" in compiler_reason()
    with pytest.raises(BuildError, match=r"kernel tiny cannot be built: no C\+\+ compiler"):
        tiny_kernel(root).load()


@pytest.mark.parametrize(("command", "words"), [
    ("no-such-c++", "CXX is 'no-such-c++', which is not an executable on PATH"), ("false", "does not answer --version (exit code 1"),
    ("g++ 'unclosed", "not a command line"),
])
def test_a_wrong_cxx_is_named(monkeypatch, command, words):
    monkeypatch.setenv("CXX", command)
    assert words in compiler_reason()


def test_without_a_compiler_what_was_built_still_loads(root, cache, monkeypatch, tmp_path):
    tiny_kernel(root).build()
    without_compiler(monkeypatch, tmp_path)
    assert tiny_kernel(root).try_load().answer() == 42
    assert tiny_kernel(root, flags=["-DOTHER"]).try_load() is None


def test_another_compiler_builds_anew(root, cache, diary, monkeypatch):
    tiny_kernel(root).build()
    monkeypatch.delenv("CXX")
    assert tiny_kernel(root).try_load() is None


def test_the_digest_covers_all_that_the_object_is_made_from(root):
    plain = tiny_kernel(root)
    others = [tiny_kernel(root, **change) for change in (
        {"flags": ["-O1"]}, {"link_flags": ["-lm"]}, {"abi_version": 2}, {"name": "tiny2"}, {"include_dirs": ["inner"]})]
    digests = {kernel.digest for kernel in [plain, *others]}
    assert len(digests) == 6
    first = plain.digest
    (root / "unrelated.h").write_text("")
    assert plain.digest == first
    (root / "inner" / "answer.h").write_text('#include <math.h>\n  # include "deep.h"\n#define ANSWER 42\n')
    (root / "inner" / "deep.h").write_text("")
    second = plain.digest
    (root / "inner" / "deep.h").write_text("#define DEEP\n")
    third = plain.digest
    (root / "tiny.cpp").write_text('#define WHICH "unrelated.h"\n#include WHICH\n')
    fourth = plain.digest
    (root / "unrelated.h").write_text("// read by a computed include\n")
    assert len({first, second, third, fourth, plain.digest}) == 5


def test_the_digest_does_not_know_where_the_sources_lie(root, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    assert tiny_kernel(write_sources(tmp_path / "elsewhere" / "csrc")).digest == tiny_kernel(root).digest


def test_a_changed_header_is_never_served_by_the_old_object(root, cache, diary):
    assert tiny_kernel(root).load().answer() == 42
    (root / "inner" / "answer.h").write_text("#define ANSWER 43\n")
    assert tiny_kernel(root).try_load() is None
    assert tiny_kernel(root).load().answer() == 43
    (root / "inner" / "answer.h").write_text("#define ANSWER 42\n")
    assert tiny_kernel(root).try_load().answer() == 42
    assert len(diary.steps()) == 4


def test_sources_that_change_meanwhile_leave_no_object(root, cache):
    def edit(step):
        if "linking" in step:
            (root / "inner" / "answer.h").write_text("#define ANSWER 43\n")

    with pytest.raises(BuildError, match="changed while they were compiled; build it again"):
        tiny_kernel(root).build(progress=edit)
    assert not list((cache / "tiny").glob("*.so"))
    assert tiny_kernel(root).load().answer() == 43


def test_a_missing_source_is_named(root, cache):
    with pytest.raises(BuildError, match=r"source .*nothing\.cpp: No such file"):
        tiny_kernel(root, sources=["nothing.cpp"]).load()


@pytest.mark.parametrize(("change", "words"), [
    ({"name": "../tiny"}, "expected letters"), ({"sources": []}, "at least one"), ({"flags": "-O3"}, "expected a sequence"),
])
def test_a_kernel_checks_itself(root, change, words):
    with pytest.raises((ValueError, TypeError), match=words):
        tiny_kernel(root, **change)


def test_the_checkouts_sources_are_found():
    assert Kernel("any", ["any.cpp"], abi_version=1).root == ROOT / "csrc"
