"""Import the real torch_npu wheel on a machine without CANN: stand-in libraries that hold the names it links against, and do nothing.

The wheel's own ELF tables say which libraries and symbols it wants and does not find; each symbol becomes a C function that returns 0. So
its operators' schemas and meta kernels are the real ones, and whatever would touch a device fails or finds none. Nothing of CANN is used.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

TOOLS = ("gcc", "nm", "readelf")


def missing() -> str:
    """'' where torch_npu can be imported by stand-ins, else why not, with the remedy."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not in this environment: `make test-ascend` makes one that has it"
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"{', '.join(lacking)} not found: the stand-in CANN libraries are built with them (gcc, binutils)"
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0":
        return "TORCH_DEVICE_BACKEND_AUTOLOAD is not 0: torch would import torch_npu before its stand-ins are there"
    return ""


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _symbols(library: Path, which: str) -> set[str]:
    """Names without their versions of the dynamic symbols that are 'defined' or 'undefined' in a library."""
    rows = [line.split() for line in _run("nm", "-D", f"--{which}-only", str(library)).splitlines()]
    return {row[-1].split("@")[0] for row in rows if which == "defined" or row[-2] == "U"}


def wanted(folder: Path) -> tuple[set[str], set[str]]:
    """(libraries, symbols) that the wheel in `folder` wants and neither torch, nor itself, nor this system has."""
    torch_libraries = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    own = [path for path in (*folder.glob("lib/*.so"), *folder.glob("_C*.so")) if "atb" not in path.name]
    here = {path.name for path in (*own, *torch_libraries.glob("*.so*"))}
    needed = {name for path in own for name in re.findall(r"\(NEEDED\).*\[(.+)\]", _run("readelf", "-d", "-W", str(path)))} - here
    found = {name: _run("gcc", f"-print-file-name={name}").strip() for name in needed}
    system = [Path(path) for path in found.values() if os.sep in path]
    libraries = {name for name, path in found.items() if os.sep not in path and not name.startswith("ld-linux")}
    defined = set().union(*(_symbols(path, "defined") for path in (*own, *torch_libraries.glob("*.so*"), *system)))
    undefined = set().union(*(_symbols(path, "undefined") for path in own))
    return libraries, {name for name in undefined - defined if not name.startswith(("Py", "_Py", "_ZTH"))}


def build(folder: Path, into: Path) -> list[Path]:
    """Compile the stand-ins into a folder; the first holds every symbol. Raises CalledProcessError."""
    libraries, symbols = wanted(folder)
    into.mkdir(parents=True, exist_ok=True)
    source = into / "symbols.c"
    source.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in sorted(symbols)))
    built = []
    for number, name in enumerate(sorted(libraries)):
        text = [str(source)] if number == 0 else ["/dev/null"]
        partial = into / f"{name}.{os.getpid()}"
        _run("gcc", "-shared", "-fPIC", "-w", "-x", "c", *text, "-o", str(partial), f"-Wl,-soname,{name}")
        built.append(partial.rename(into / name))
    return built


def load_torch_npu():
    """The torch_npu module. Builds the stand-ins beside the environment on first use. Call missing() first."""
    if "torch_npu" in sys.modules:
        return sys.modules["torch_npu"]
    folder = Path(importlib.util.find_spec("torch_npu").origin).parent
    into = Path(sys.prefix) / "cann-stand-in"
    ready = into / "ready"
    if not ready.exists():
        build(folder, into)
        ready.touch()
    for library in sorted(into.glob("lib*.so")):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import torch_npu

    # Its meta kernel of npu_fusion_attention would ask the device which chip it is, to word a warning.
    from torch_npu.op_plugin.meta import _meta_registrations

    _meta_registrations._npu_fusion_attention_warning_printed = True
    return torch_npu
