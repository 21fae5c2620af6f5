"""The environment variables of the project, in one table.

A misspelt variable changes nothing and says nothing, so every HETERO_ATTN_* name outside the table is warned about, once.
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Mapping

PREFIX = "HETERO_ATTN_"

VARIABLES: dict[str, str] = {
    "HETERO_ATTN_BACKEND": "attention backend by name; it runs or raises (below a call's argument and use_backend, above the profile)",
    "HETERO_ATTN_PROFILE": "device profile: the name of a shipped one or the path of a YAML file (else the device is detected)",
    "HETERO_ATTN_SET": "profile settings, 'kv_block_size=32;hardware.memory_gib=16' (below --set, above overlay and file)",
    "HETERO_ATTN_CONFIG_DIR": "folder of the user's own settings; overlays are in overlays/ under it (else $XDG_CONFIG_HOME/hetero_attn)",
    "HETERO_ATTN_CACHE_DIR": "folder of compiled kernels (else $XDG_CACHE_HOME/hetero_attn)",
    "HETERO_ATTN_PREBUILD": "1 = building a wheel of this project compiles the kernels into it (`make wheel-prebuilt`)",
    "HETERO_ATTN_CPU_INSTRUCTION_SET": "which kernels of backend cpu run: avx512bf16, avx512, avx2, neon, portable (else the best here)",
    "HETERO_ATTN_CPU_FLAGS": "further compiler flags for them, '-g -fsanitize=address' (the objects are then others)",
    "HETERO_ATTN_TOKEN": "secret that all ranks of `generate` must know; a rank that does not is named and refused",
    "HETERO_ATTN_DEBUG": "1 = the command line shows the traceback of an error",
    "HETERO_ATTN_TEST_BACKENDS": "attention backends the conformance suite runs, separated by commas (else all that are found)",
    "HETERO_ATTN_TEST_DEVICE": "device type the suites run on (else cpu, and for attention each on which the backend runs a plain case)",
    "HETERO_ATTN_TEST_COMMUNICATORS": "communicators the conformance suite runs, separated by commas (else all that are found)",
    "HETERO_ATTN_FULL": "1 = run the tests' full grids",
}

_warned: set[str] = set()


def unknown_variables(environ: Mapping[str, str] | None = None) -> dict[str, str | None]:
    """Each HETERO_ATTN_* variable that is set but not in the table -> the nearest known name, or None."""
    names = sorted(name for name in (os.environ if environ is None else environ) if name.startswith(PREFIX) and name not in VARIABLES)
    known = {name.removeprefix(PREFIX): name for name in VARIABLES}      # all share the prefix, so it says nothing about nearness
    close = {name: difflib.get_close_matches(name.removeprefix(PREFIX), known, n=1) for name in names}
    return {name: known[near[0]] if near else None for name, near in close.items()}


def warn_unknown_variables(environ: Mapping[str, str] | None = None) -> None:
    """Warn (UserWarning) about every unknown HETERO_ATTN_* variable, each at most once in this process."""
    for name, near in unknown_variables(environ).items():
        if name in _warned:
            continue
        _warned.add(name)
        hint = f"did you mean {near}?" if near else f"known are {', '.join(VARIABLES)}"
        warnings.warn(f"unknown environment variable {name} has no effect; {hint}", stacklevel=2)
