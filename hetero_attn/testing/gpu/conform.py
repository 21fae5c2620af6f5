"""The attention suite on one backend and device, without pytest: python -m hetero_attn.testing.gpu.conform --backend triton --device cuda

Prints one JSON object on the last line: how many cases passed, how many the backend objected to, and what failed. It is run in a process of
its own, because a kernel that reads where it must not can take the whole device context with it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from hetero_attn.backend import UnsupportedError
from hetero_attn.testing.attention import check
from hetero_attn.testing.attention_cases import attention_cases, plain_cases

SHOWN = 20                                           # failures that are kept


def cases_of(share: int, few: bool) -> list:
    """The reduced grid, every `share`-th of it, or (few) some small cases of each kind."""
    cases = attention_cases()
    if few:
        kinds = ("plain-", "causal-5x49", "paged-16-everything", "varlen-mixed-everything", "everything-49x5", "window-decode")
        return [case for case in cases if case.name.startswith(kinds) and not case.gradients]
    return plain_cases() + cases[len(plain_cases()) :: share]


def conform(backend: str, device: str, cases: list, progress: bool = False) -> dict:
    """{"passed", "objected", "failed": {case: text}, "seconds"} of one backend."""
    begin, passed, objected, failed = time.perf_counter(), 0, 0, {}
    for index, case in enumerate(cases):
        try:
            check(case, backend, device)
            passed += 1
        except UnsupportedError:
            objected += 1
        except Exception as error:
            failed[case.name] = f"{type(error).__name__}: {error}"[:1500]
        if progress and sys.stderr.isatty():
            print(f"\r{backend}: {index + 1} of {len(cases)}, {len(failed)} failed", end="", file=sys.stderr, flush=True)
    if progress and sys.stderr.isatty():
        print(file=sys.stderr)
    kept = dict(list(failed.items())[:SHOWN])
    return {"backend": backend, "device": device, "passed": passed, "objected": objected, "failures": len(failed), "failed": kept,
            "seconds": round(time.perf_counter() - begin, 1)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hetero_attn.testing.gpu.conform", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--share", type=int, default=1, help="one case in so many of the grid")
    parser.add_argument("--few", action="store_true", help="some small cases of each kind (for compute-sanitizer)")
    args = parser.parse_args(argv)
    if args.share < 1:
        parser.error(f"--share {args.share}: expected 1 or more")
    found = conform(args.backend, args.device, cases_of(args.share, args.few), progress=True)
    print(json.dumps(found))
    return 1 if found["failures"] or not found["passed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
