"""The README's table, device by feature, from what the backends say: python -m hetero_attn.testing.feature_table [--write README.md]

A cell names the first backend of the profile that can express the feature on that device (its availability on this machine plays no
part), with a mark where the backend remarks on it (expressed, but not by a fused kernel) or the device's numbers do (a slow dtype).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from hetero_attn import registry
from hetero_attn.explain import notes
from hetero_attn.profile import DeviceProfile, load_profile, shipped_profiles
from hetero_attn.spec import AttentionSpec

START, END = "<!-- feature table: made by `make table` -->", "<!-- end of feature table -->"
BASE = AttentionSpec("cpu", torch.float16, 1, 32, 8, 1024, 1024, 128, 128, is_causal=True, scale=0.088)

# feature -> what it changes in a causal fp16 GQA prefill
FEATURES: dict[str, dict] = {
    "fp16": {},
    "bf16": {"dtype": torch.bfloat16},
    "fp32": {"dtype": torch.float32},
    "decode": {"q_len": 1},
    "window": {"window_size": (255, 0)},
    "bool mask": {"mask": torch.bool, "is_causal": False},
    "float mask": {"mask": torch.float16, "is_causal": False},
    "ALiBi": {"alibi": 1},
    "softcap": {"softcap": 30.0},
    "sinks": {"sinks": True},
    "lse": {"return_lse": True},
    "Dv ≠ D": {"v_head_dim": 64},
    "varlen": {"varlen": True, "batch": 4},
    "paged": {"varlen": True, "batch": 4, "page_size": 16},
    "gradients": {"needs_grad": True},
}


def cell(profile: DeviceProfile, changes: dict) -> str:
    """'sdpa', 'sdpa*' (with a remark or a note), or '–' where no backend of the profile expresses it."""
    spec = replace(BASE, device=profile.device, **changes)
    for name in profile.backends:
        backend = registry.find(name)
        if name in registry.names() and not backend.unsupported_reasons(spec):
            return f"{name}*" if backend.remarks(spec) or notes(spec, profile) else name
    return "–"


def table() -> str:
    """The table in Markdown, with its markers."""
    profiles = [load_profile(path) for path in shipped_profiles().values()]
    lines = ["| feature | " + " | ".join(p.name for p in profiles) + " |", "|---" * (len(profiles) + 1) + "|"]
    lines += ["| " + " | ".join([feature, *(cell(p, changes) for p in profiles)]) + " |" for feature, changes in FEATURES.items()]
    lines.append("| run on a real device | " + " | ".join("–" if p.verified == "none" else "yes" for p in profiles) + " |")
    note = (
        "`*` expressed in plain torch or with extra steps, not by one fused kernel, or in a dtype the device has no matrix units for "
        "(`hetero-attn explain` says which). `–` nothing yet."
    )
    return "\n".join([START, "", *lines, "", note, "", END])


def replaced(text: str) -> str:
    """`text` with its table made anew. Raises ValueError if it has no markers."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the text has no lines {START!r} and {END!r} to put the table between")
    return before + table() + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into this file, between its markers")
    path = parser.parse_args().write
    if path is None:
        print(table())
        return 0
    try:
        path.write_text(replaced(path.read_text()))
    except (OSError, ValueError) as error:
        print(f"feature_table: error: {path}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
