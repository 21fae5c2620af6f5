"""The process of one check (see apart.py): python -m hetero_attn.testing.gpu.inside NAME DEVICE DEADLINE [--quick] prints its outcome."""

from __future__ import annotations

import json
import sys

import torch

from hetero_attn.testing.gpu import checks


def main(argv: list[str]) -> int:
    """Carries the check out here and prints what came of it. DEADLINE: by time.monotonic(), so that starting counts too."""
    name, device, deadline, *rest = argv
    run = checks.Run(torch.device(device), "--quick" in rest, deadline=float(deadline))
    print(json.dumps(checks.carried_out(checks.selected(name)[0], run, inside=True).to_dict()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
