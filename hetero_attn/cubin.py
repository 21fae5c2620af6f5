"""CUDA kernels as cubins: one source and one architecture, found ready or compiled by NVRTC, which needs no GPU.

The same three places and the same cache as native kernels (jit.py, artifacts.py). NVRTC comes from PyPI (nvidia-cuda-nvrtc-cu12) and is
called through ctypes, because CuPy compiles nothing where there is no driver. 12.9 is the last that makes sm_70; 13, which torch's CUDA 13
builds bring, serves where there is no 12 and refuses that architecture itself. What ptxas says of registers, spills and shared memory is
recorded with the cubin.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import re
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hetero_attn.artifacts import NAME, Artifacts, CacheError, Progress, cache_folder
from hetero_attn.jit import PREBUILT, BuildError, Kernel, csrc_dir

PACKAGE = "nvidia-cuda-nvrtc-cu12==12.9.86"
REMEDY = f"pip install {PACKAGE} (it is in hetero-attn[cuda12])"
OPTIONS = ("-std=c++17", "--ptxas-options=-v", "-default-device")
USED = re.compile(r"Used (\d+) registers")
SPILLED = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
STATIC = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Nvrtc:
    """NVRTC's library and version. Raises BuildError from compile()."""

    library: ctypes.CDLL
    version: tuple[int, int]

    def compile(self, name: str, source: str, options: list[str]) -> tuple[bytes, str]:
        """(cubin, what it said). Raises BuildError with NVRTC's own words."""
        nvrtc, program, size = self.library, ctypes.c_void_p(), ctypes.c_size_t()
        self._check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None), name)
        try:
            array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = nvrtc.nvrtcCompileProgram(program, len(options), array)
            self._check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)), name)
            log = ctypes.create_string_buffer(max(1, size.value))
            self._check(nvrtc.nvrtcGetProgramLog(program, log), name)
            text = log.value.decode(errors="replace").strip()
            self._check(status, name, text)
            self._check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), name, text)
            if not size.value:
                raise BuildError(f"kernel {name}: NVRTC {self.words} made no cubin with {' '.join(options)}\n{text}", text)
            cubin = ctypes.create_string_buffer(size.value)
            self._check(nvrtc.nvrtcGetCUBIN(program, cubin), name, text)
            return cubin.raw, text
        finally:
            nvrtc.nvrtcDestroyProgram(ctypes.byref(program))

    @property
    def words(self) -> str:
        return "{}.{}".format(*self.version)

    def _check(self, status: int, name: str, log: str = "") -> None:
        if status:
            words = self.library.nvrtcGetErrorString(status).decode()
            last = "\n".join(f"  {line}" for line in log.splitlines()[-20:])
            raise BuildError(f"kernel {name}: NVRTC {self.words}: {words}\n{last}", log)


@cache
def find_nvrtc() -> Nvrtc | str:
    """NVRTC 12 from its wheel, else from the system, else 13; or the reason why there is none."""
    places = [*_carried("nvidia.cuda_nvrtc", 12), "libnvrtc.so.12", *_carried("nvidia.cu13", 13), "libnvrtc.so.13"]
    for place in places:
        try:
            library = ctypes.CDLL(str(place))
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) == 0:
            return Nvrtc(library, (major.value, minor.value))
    return f"NVRTC 12 is not installed; {REMEDY}"


def _carried(package: str, major: int) -> list[Path]:
    """NVRTC in a wheel."""
    try:
        wheel = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        return []
    folders = (wheel.submodule_search_locations or ()) if wheel else ()
    return [place for folder in folders for place in sorted(Path(folder).glob(f"lib/libnvrtc.so.{major}*"))]


def nvrtc_reason() -> str | None:
    """Why no cubin can be made here, with the remedy; None = it can."""
    found = find_nvrtc()
    return found if isinstance(found, str) else None


@dataclass(frozen=True)
class Cubin:
    """One .cu for one architecture. name: of its folder in the cache, with the architecture. source: relative to `root`. defines: for the
    preprocessor. arch: 'sm_70', by which `hetero-attn build --arch` selects. used_here: this machine will use it.
    """

    name: str
    source: str
    defines: tuple[tuple[str, int | str], ...] = ()
    arch: str = field(default="sm_70", kw_only=True)
    used_here: bool = field(default=False, kw_only=True, compare=False)
    root: Path = field(default_factory=csrc_dir, kw_only=True)

    def __post_init__(self):
        object.__setattr__(self, "name", f"{self.name}-{self.arch}")
        if not NAME.fullmatch(self.name):
            raise ValueError(f"Cubin name is {self.name!r}, expected letters, digits and . _ + -")

    @property
    def _options(self) -> tuple[str, ...]:
        return (*OPTIONS, f"-arch={self.arch}", *(f"-D{name}={value}" for name, value in self.defines))

    @property
    def digest(self) -> str:
        """32 hex digits over the source, what it includes, and the options. Raises BuildError where a file is missing."""
        total = hashlib.sha256(repr((self.name, self._options)).encode())
        for label, content in Kernel(self.name, (self.source,), abi_version=0, root=self.root)._files():
            total.update(f"\n{label} {len(content)}\n".encode() + content)
        return total.hexdigest()[:32]

    def find(self, into: Path | None = None) -> Path | None:
        """The cubin that build() would return without compiling, or None."""
        if into:
            return Artifacts(Path(into), private=False).find(self.name, self.digest)
        if prebuilt := Artifacts(self.root / PREBUILT, private=False).find(self.name, self.digest):
            return prebuilt
        try:
            return Artifacts(cache_folder()).find(self.name, self.digest)
        except CacheError:
            return None

    def facts(self) -> dict[str, Any]:
        """What ptxas said of the cubin that find() returns (facts_of, and compiler, flags, seconds); {} if there is none."""
        path = self.find()
        return Artifacts(path.parent.parent, private=False).facts(self.name, self.digest) if path else {}

    def build(self, *, force: bool = False, progress: Progress | None = None, into: Path | None = None) -> Path:
        """The cubin's path, compiled now unless it is there; force: compiled in any case. into: a folder in place of the cache.

        Raises BuildError. Processes that build it at once compile it once.
        """
        if not force and (found := self.find(into)):
            return found
        nvrtc = find_nvrtc()
        if isinstance(nvrtc, str):
            raise BuildError(f"kernel {self.name} cannot be built: {nvrtc}")

        def write(scratch: Path) -> tuple[Path, dict[str, Any]]:
            if progress:
                progress(f"{self.name}: compiling {self.source}")
            started = time.perf_counter()
            path = self.root / self.source
            options = [*self._options, f"-I{path.parent}", f"-I{self.root}"]
            cubin, log = nvrtc.compile(self.name, path.read_text(), options)
            made = scratch / f"{self.name}.cubin"
            made.write_bytes(cubin)
            return made, {"arch": self.arch, "compiler": f"NVRTC {nvrtc.words}", "flags": " ".join(self._options), **facts_of(log),
                          "seconds": round(time.perf_counter() - started, 2), "made": time.strftime("%Y-%m-%d")}

        try:
            place = Artifacts(Path(into), private=False) if into else Artifacts(cache_folder())
            return place.make(self.name, self.digest, write, force=force, progress=progress)
        except CacheError as error:
            raise BuildError(f"kernel {self.name} cannot be built: {error}") from None

    def checked(self) -> Path:
        """The cubin as this machine will use it (Kernel.checked): built; a driver loads it when it is first launched."""
        return self.build()


@dataclass(frozen=True)
class KernelSource:
    """One kernel in source, for every architecture: the file under csrc/, the function in it, and what the preprocessor is told."""

    source: str                        # "volta/forward.cu"; the folder is the family, and the first part of a cubin's name
    function: str
    name: str                          # of the variant
    defines: tuple[tuple[str, int], ...] = ()

    def cubin(self, arch: str, *, used_here: bool = False) -> Cubin:
        """The kernel for one architecture, such as 'sm_70'."""
        return Cubin(f"{Path(self.source).parts[0]}-{self.name}", self.source, self.defines, arch=arch, used_here=used_here)


def facts_of(log: str) -> dict[str, int]:
    """ptxas's report of the functions of one cubin: the most registers, and the sums of what was spilled and of stack frames."""
    spills = [tuple(map(int, found)) for found in SPILLED.findall(log)]
    return {"registers": max(map(int, USED.findall(log)), default=0), "spill_bytes": sum(stores + loads for _, stores, loads in spills),
            "stack_bytes": sum(frame for frame, _, _ in spills), "static_shared_bytes": sum(map(int, STATIC.findall(log)))}
