"""Native kernels: one shared object from C++17 sources under csrc/, found ready or compiled on first use.

Three places, in this order: prebuilt beside the sources (a wheel carries it), the user's cache, the system's compiler. An object is known
by a digest of all that it is made from, so that an edited header is never served by yesterday's object. C ABI and ctypes, no framework
headers: installing needs no compiler, and one object serves every Python and torch. The cache is in artifacts.py.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hetero_attn.artifacts import NAME, Artifacts, CacheError, Progress, cache_folder
from hetero_attn.compiler import REMEDY, Compiler, compiler_reason, environment, find_compiler

__all__ = ["BuildError", "Kernel", "cache_folder", "compiler_reason", "csrc_dir"]

PREBUILT = "prebuilt"                 # folder beside the sources
BASE_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden")
LAST_LINES = 20
INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*(?:["<]([^">\n]+)[">]|(\w))', re.MULTILINE)
HEADERS = (".h", ".hh", ".hpp", ".inc", ".inl", ".ipp")
log = logging.getLogger("hetero_attn")


class BuildError(RuntimeError):
    """A kernel could not be built or loaded. The text says which, with what command, the compiler's last words, and what to do.

    output: all that the compiler wrote ('' where it did not come to that).
    """

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


def csrc_dir() -> Path:
    """The C++ sources: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


@dataclass(frozen=True)
class Kernel:
    """One shared object.

    name: also its folder in the cache. sources: paths relative to `root`. flags: for compiling and linking, after BASE_FLAGS; link_flags:
    for linking only. abi_version: raise it when the C functions' signatures change. include_dirs: relative to `root`, which is one itself.
    compiler: a command line in place of CXX. arch: the label that `hetero-attn build --arch` selects by, 'avx2'. used_here: this machine
    will use it, so `hetero-attn build` makes it unasked. root: csrc_dir(), unless the sources are shipped elsewhere.
    """

    name: str
    sources: tuple[str, ...]
    flags: tuple[str, ...] = field(default=(), kw_only=True)
    link_flags: tuple[str, ...] = field(default=(), kw_only=True)
    abi_version: int = field(kw_only=True)
    include_dirs: tuple[str, ...] = field(default=(), kw_only=True)
    compiler: str | None = field(default=None, kw_only=True)
    arch: str = field(default="portable", kw_only=True)
    used_here: bool = field(default=True, kw_only=True, compare=False)
    root: Path = field(default_factory=csrc_dir, kw_only=True)

    def __post_init__(self):
        for each in ("sources", "flags", "link_flags", "include_dirs"):
            value = getattr(self, each)
            if isinstance(value, str):
                raise TypeError(f"Kernel {self.name!r}: {each} is {value!r}, expected a sequence of strings")
            object.__setattr__(self, each, tuple(map(str, value)))
        object.__setattr__(self, "root", Path(self.root))
        if not NAME.fullmatch(self.name):
            raise ValueError(f"Kernel name is {self.name!r}, expected letters, digits and . _ + -")
        if not self.sources:
            raise ValueError(f"Kernel {self.name!r} has no sources, expected at least one")

    # -- what it is made from

    @property
    def digest(self) -> str:
        """32 hex digits over sources, headers, flags, ABI version, processor and libc. Raises BuildError where a source is missing.

        Paths count relative to `root` and the compiler not at all: a wheel's object is known on another machine."""
        total = hashlib.sha256()
        facts = (self.name, self.sources, BASE_FLAGS, self.flags, self.link_flags, self.include_dirs, self.abi_version, platform.machine(),
                 _libc().partition(" ")[0])
        total.update(repr(facts).encode())
        for label, content in self._files():
            total.update(f"\n{label} {len(content)}\n".encode() + content)
        return total.hexdigest()[:32]

    def _files(self) -> list[tuple[str, bytes]]:
        """(path relative to root, content) of every source and of every header that is reached from one and is not the system's."""
        found: dict[Path, bytes] = {}
        waiting = [self.root / source for source in self.sources]
        while waiting:
            path = Path(os.path.normpath(waiting.pop()))
            if path in found:
                continue
            try:
                found[path] = path.read_bytes()
            except OSError as error:
                raise BuildError(f"kernel {self.name}: source {path}: {error.strerror}; reinstall hetero-attn") from None
            for literal, computed in INCLUDE.findall(found[path]):
                if computed:                                # #include MACRO may mean any header beside it
                    waiting += [header for header in path.parent.iterdir() if header.suffix in HEADERS]
                else:
                    places = (path.parent, self.root, *(self.root / folder for folder in self.include_dirs))
                    waiting += [place / os.fsdecode(literal) for place in places if (place / os.fsdecode(literal)).is_file()][:1]
        return sorted((os.path.relpath(path, self.root), content) for path, content in found.items())

    def _key(self, compiler: Compiler) -> str:
        """The digest and the compiler's: an object built here goes with the compiler and the libc it was built with."""
        return f"{self.digest}-{hashlib.sha256(repr((compiler, _libc())).encode()).hexdigest()[:16]}"

    # -- where it is

    def candidates(self) -> Iterator[Path]:
        """The ready objects, in the order in which they are tried: prebuilt, then the cache's. Raises BuildError like digest.

        Without a compiler any object in the cache that was made from these sources will do: nobody can make a better one."""
        if prebuilt := Artifacts(self.root / PREBUILT, private=False).find(self.name, self.digest):
            yield prebuilt
        if cached := self._cached():
            yield cached

    def _cached(self) -> Path | None:
        try:
            cache = Artifacts(cache_folder())
        except CacheError:
            return None
        compiler = find_compiler(self.compiler)
        keys = [self._key(compiler)] if isinstance(compiler, Compiler) else [k for k in cache.keys(self.name) if k.startswith(self.digest)]
        return next(filter(None, (cache.find(self.name, key) for key in keys)), None)

    def find(self, into: Path | None = None) -> Path | None:
        """The object that build() would return without compiling, or None."""
        return Artifacts(Path(into), private=False).find(self.name, self.digest) if into else next(self.candidates(), None)

    def try_load(self) -> ctypes.CDLL | None:
        """The kernel if it is there ready and the system's loader takes it, else None. Never compiles. Raises BuildError like digest."""
        for path in self.candidates():
            try:
                return ctypes.CDLL(str(path))
            except OSError as error:                        # built for a newer libc, say
                log.info("kernel %s: %s does not load (%s)", self.name, path, error)
        return None

    def build(self, *, force: bool = False, progress: Progress | None = None, into: Path | None = None) -> Path:
        """The object's path, compiled now unless it is there; force: compiled in any case.

        progress: called with a line of text before each step, from several threads. into: a folder, written like a prebuilt one, instead of
        the cache. Raises BuildError. Processes that build it at once compile it once.
        """
        found = None if force else self.find(into)
        return found or self._compile(force, progress, into)

    def load(self, *, progress: Progress | None = None) -> ctypes.CDLL:
        """The kernel: try_load(), else build(), of which `progress` hears. Raises BuildError."""
        ready = self.try_load()
        if ready is not None:
            return ready
        path = self._compile(self._cached() is not None, progress)     # one that is whole and does not load is made anew
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(f"kernel {self.name} was built as {path} and does not load: {error}") from None

    def checked(self) -> Path:
        """The object as this machine will use it: built, and loaded to see that it can be. Raises BuildError."""
        return Path(self.load()._name)

    # -- making it

    def _compile(self, force: bool, progress: Progress | None = None, into: Path | None = None) -> Path:
        compiler = find_compiler(self.compiler)
        if isinstance(compiler, str):
            raise BuildError(f"kernel {self.name} cannot be built: {compiler}")
        try:
            place = Artifacts(Path(into), private=False) if into else Artifacts(cache_folder())
            key = (lambda: self.digest) if into else (lambda: self._key(compiler))
            before = key()

            def write(scratch: Path) -> tuple[Path, dict[str, Any]]:
                made = self._run(compiler, scratch, progress)
                if key() != before:
                    raise BuildError(f"kernel {self.name}: its sources changed while they were compiled; build it again")
                return made

            return place.make(self.name, before, write, force=force, progress=progress)
        except CacheError as error:
            raise BuildError(f"kernel {self.name} cannot be built: {error}") from None

    def _run(self, compiler: Compiler, scratch: Path, progress: Progress | None) -> tuple[Path, dict[str, Any]]:
        """Compile the sources side by side, one process a core, and link them: (the object, what to record of it)."""
        log.info("building kernel %s with %s", self.name, compiler.version)
        started, made = time.perf_counter(), scratch / f"{self.name}.so"
        includes = [f"-I{self.root / folder}" for folder in ("", *self.include_dirs)]
        settings = [*BASE_FLAGS, *self.flags, f"-ffile-prefix-map={self.root}=csrc"]       # no path of this machine in the object
        parts = [scratch / f"{index}.o" for index in range(len(self.sources))]
        commands = [[*compiler.command, *settings, *includes, "-c", str(self.root / source), "-o", str(part)]
                    for source, part in zip(self.sources, parts)]
        with ThreadPoolExecutor(min(len(commands), len(os.sched_getaffinity(0)))) as pool:
            jobs = [pool.submit(self._step, command, f"compiling {source}", progress) for source, command in zip(self.sources, commands)]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self._step([*compiler.command, *settings, "-shared", *map(str, parts), *self.link_flags, "-o", str(made)], "linking", progress)
        return made, {"arch": self.arch, "compiler": compiler.version, "target": compiler.target,
                      "flags": shlex.join([*BASE_FLAGS, *self.flags, *self.link_flags]),
                      "seconds": round(time.perf_counter() - started, 2), "made": time.strftime("%Y-%m-%d")}

    def _step(self, command: list[str], what: str, progress: Progress | None) -> None:
        if progress:
            progress(f"{self.name}: {what}")
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment(), stdin=subprocess.DEVNULL)
        except OSError as error:
            raise BuildError(f"kernel {self.name}: {what}: {command[0]} does not run ({error.strerror}); {REMEDY}") from None
        if done.returncode:
            output = (done.stderr + done.stdout).strip()
            last = "\n".join(f"  {line}" for line in output.splitlines()[-LAST_LINES:]) or "  (it said nothing)"
            raise BuildError(f"kernel {self.name}: {what} failed with exit code {done.returncode}\ncommand: {shlex.join(command)}\n{last}\n"
                             f"`hetero-attn build` shows all of it; another compiler can be named by CXX", output)


def _libc() -> str:
    """'glibc 2.36'; 'libc' where the C library does not tell (musl)."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or "libc"
    except (ValueError, OSError):
        return "libc"
