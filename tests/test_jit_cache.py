"""What is loaded into the process: nothing damaged, foreign or stale, from the cache or from beside the sources; and what is swept."""

import json
import os
import time
from pathlib import Path

import pytest
from native import needs_compiler, tiny_kernel, write_sources

from hetero_attn import jit
from hetero_attn.artifacts import Artifacts
from hetero_attn.jit import BuildError

pytestmark = needs_compiler


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HETERO_ATTN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path) -> Path:
    return write_sources(tmp_path / "csrc")


def without_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def test_a_cache_that_cannot_be_written(root, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HETERO_ATTN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    kernel = tiny_kernel(root)
    assert kernel.try_load() is None
    with pytest.raises(BuildError, match=r"file/cache.*Not a directory; set HETERO_ATTN_CACHE_DIR to a folder of yours"):
        kernel.load()


def test_a_cache_that_others_may_write_is_refused(root, cache):
    kernel = tiny_kernel(root)
    kernel.build()
    cache.chmod(0o777)
    assert kernel.try_load() is None                     # what lies there may be anybody's
    with pytest.raises(BuildError, match="is writable by everybody, and code is loaded from it"):
        kernel.load()
    cache.chmod(0o700)
    assert kernel.try_load().answer() == 42


def test_a_cache_of_another_user_is_refused(root, cache, monkeypatch):
    kernel = tiny_kernel(root)
    object_file = kernel.build()
    if os.geteuid() == 0:
        os.chown(object_file, 12345, -1)
        assert kernel.try_load() is None                 # a foreign file in a folder of ours
        os.chown(cache, 12345, -1)
    else:
        stranger = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: stranger)
        assert kernel.try_load() is None
    with pytest.raises(BuildError, match=r"belongs to user .*set HETERO_ATTN_CACHE_DIR"):
        kernel.load()


def test_the_cache_is_ours_alone_whatever_the_umask(root, cache):
    before = os.umask(0)
    try:
        tiny_kernel(root).build()
    finally:
        os.umask(before)
    assert cache.stat().st_mode & 0o777 == 0o700 and (cache / "tiny").stat().st_mode & 0o777 == 0o700


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("HETERO_ATTN_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert jit.cache_folder() == tmp_path / "hetero_attn"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert jit.cache_folder() == tmp_path / "home" / ".cache" / "hetero_attn"


def damage_byte(file, manifest):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "a byte": damage_byte,
    "truncated": lambda file, manifest: os.truncate(file, 4096),
    "empty": lambda file, manifest: os.truncate(file, 0),
    "no object": lambda file, manifest: file.unlink(),
    "no manifest": lambda file, manifest: manifest.unlink(),
    "half a manifest": lambda file, manifest: os.truncate(manifest, 40),
    "another manifest": lambda file, manifest: manifest.write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_object_is_built_anew(root, cache, damage):
    kernel = tiny_kernel(root)
    file = kernel.build()
    damage(file, next(file.parent.glob("*.json")))
    assert kernel.try_load() is None
    assert kernel.load().answer() == 42
    assert len(list((cache / "tiny").glob("*.so"))) == 1


def put_an_object_that_does_not_load(store: Artifacts, key: str):
    def write(scratch):
        (scratch / "tiny.so").write_bytes(b"an object of another processor")
        return scratch / "tiny.so", {}
    return store.make("tiny", key, write, force=True)


def test_an_object_that_is_whole_and_does_not_load_is_built_anew(root, cache):
    kernel = tiny_kernel(root)
    key = json.loads(next(kernel.build().parent.glob("*.json")).read_text())["key"]
    put_an_object_that_does_not_load(Artifacts(cache), key)
    assert kernel.try_load() is None
    assert kernel.load().answer() == 42


def test_what_nobody_used_for_a_month_is_swept(root, cache):
    files = [tiny_kernel(root, abi_version=version).build() for version in (1, 2, 3)]
    manifests = [next(file.parent.glob(f"{tiny_kernel(root, abi_version=v).digest}*.json")) for v, file in zip((1, 2, 3), files)]
    for manifest, days in zip(manifests, (31, 29, 40)):
        os.utime(manifest, (time.time() - days * 86400,) * 2)
    assert tiny_kernel(root, abi_version=3).try_load().answer() == 42        # used, so its month begins again
    orphan = cache / "tiny" / "orphan.so"
    orphan.touch()
    tiny_kernel(root, abi_version=4).build()
    assert [file.exists() for file in files] == [False, True, True]
    assert [manifest.exists() for manifest in manifests] == [False, True, True]
    assert not orphan.exists()


def test_a_prebuilt_object_needs_neither_compiler_nor_cache(root, tmp_path, monkeypatch):
    kernel = tiny_kernel(root)
    kernel.build(into=root / "prebuilt")
    without_compiler(monkeypatch, tmp_path)
    monkeypatch.setenv("HETERO_ATTN_CACHE_DIR", "/dev/null/cache")
    assert kernel.find() == kernel.build() == kernel.find(root / "prebuilt")
    assert kernel.load().answer() == 42
    (root / "inner" / "answer.h").write_text("#define ANSWER 43\n")
    assert kernel.try_load() is None                     # another source than the one it was built from


def test_a_prebuilt_object_that_does_not_load_is_passed_over(root, cache, monkeypatch, tmp_path):
    kernel = tiny_kernel(root)
    put_an_object_that_does_not_load(Artifacts(root / "prebuilt", private=False), kernel.digest)
    assert kernel.try_load() is None
    assert kernel.load().answer() == 42
    without_compiler(monkeypatch, tmp_path)
    assert kernel.try_load().answer() == 42
