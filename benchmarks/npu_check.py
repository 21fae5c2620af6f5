"""What to run on an Ascend NPU, once: python benchmarks/npu_check.py [--quick] [--page FILE], or make npu-check.

Looks at what is there, runs the conformance suites on it, times a few shapes beside torch's SDPA in one run, and writes a page with the
versions, the counts and the figures, to be sent back: until somebody does, everything about Ascend says `verified: none`. Without an NPU it
says what it needs and leaves with code 3. --rehearse NAME goes through the same motions with another backend on this machine's CPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "backends"), str(ROOT / "benchmarks")]

import npu_served  # noqa: E402

NEEDS = """an Ascend NPU of Atlas A2 (Ascend910B1 to B4; two or more for the communicator too), its driver (`npu-smi info` lists it), and
  CANN 8.0 or later with set_env.sh sourced in this shell
torch and the torch_npu built against it: pip install torch==2.13.0 torch-npu==2.13.0
for our own kernel also: pip install triton-ascend==3.2.0   (it takes the place of the package triton)
this checkout with its test packages: pip install -e '.[dev]'"""
SHAPES = {                                  # B, Hq, Hkv, Sq, Skv, D
    "prefill 1K": (1, 32, 8, 1024, 1024, 128), "prefill 4K": (1, 32, 8, 4096, 4096, 128), "prefill 16K": (1, 8, 8, 16384, 16384, 128),
    "decode 4K": (8, 32, 8, 1, 4096, 128), "prefill 4K, softcap": (1, 32, 8, 4096, 4096, 128),
}
ROUNDS = 20


@dataclass(frozen=True)
class Suite:
    """One run of pytest. served: how many calls went which way, in words. tail: its last lines, where something failed."""

    name: str
    passed: int
    skipped: int
    failed: int
    seconds: float
    served: str = ""
    tail: str = ""


def versions() -> dict[str, str]:
    """What is installed, as far as it matters."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in ("torch", "torch_npu", "triton-ascend", "triton", "hetero-attn"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    cann = Path(os.environ.get("ASCEND_HOME_PATH", "/usr/local/Ascend/ascend-toolkit/latest")) / "version.cfg"
    found["CANN"] = cann.read_text().strip().replace("\n", "; ") if cann.is_file() else "not found"
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    found["commit"] = done.stdout.strip() or "unknown"
    return found


def run_suite(name: str, arguments: list[str], environment: dict[str, str], report: Path) -> Suite:
    """Run pytest in a process of its own; whatever becomes of it is in the Suite."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "npu_served", f"--junitxml={report}", *arguments]
    served = report.with_suffix(".served")
    environment = {**os.environ, **environment, npu_served.VARIABLE: str(served.resolve())}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    ways = npu_served.read(served)
    try:
        counts = ElementTree.parse(report).getroot().find("testsuite").attrib
        failed = int(counts["failures"]) + int(counts["errors"])
        skipped = int(counts["skipped"])
        passed = int(counts["tests"]) - failed - skipped
    except (OSError, ElementTree.ParseError, AttributeError, KeyError):
        passed, skipped, failed = 0, 0, 1
    tail = "" if not failed and done.returncode == 0 else "\n".join((done.stdout + done.stderr).splitlines()[-15:])
    return Suite(name, passed, skipped, failed or int(done.returncode != 0), seconds, ways, tail)


def collectives_run(backend: str, devices: int, quick: bool) -> tuple[list[str] | None, str]:
    """pytest's arguments for the collectives' suite where there are devices for it, else None; and what the page says of it. Three ranks
    stand for what the fused operator does not take."""
    if devices < 2:
        return None, f"not run, {devices} device{'s' * (devices != 1)}"
    sizes = [size for size in (2, 3) if size <= devices]
    wanted = " or ".join(f"{backend}-{size}]" for size in sizes)
    only = f"({wanted}) and all_reduce-float32" if quick else wanted
    return ["--pyargs", "hetero_attn.testing.test_collectives", "-k", only], f"{' and '.join(map(str, sizes))} ranks, one a device"


def timings(backend: str, device: str, quick: bool) -> list[tuple[str, float | str, float | str]]:
    """(shape, our ms, sdpa's ms), medians, interleaved in one run; words where one of them did not run it."""
    import torch

    from hetero_attn import attention

    module = torch.get_device_module(device) if device != "cpu" else None
    rows = []
    for name, (B, Hq, Hkv, Sq, Skv, D) in list(SHAPES.items())[: 1 if quick else None]:
        q, k, v = (torch.randn(B, heads, length, D, dtype=torch.float16, device=device)
                   for heads, length in ((Hq, Sq), (Hkv, Skv), (Hkv, Skv)))
        options = {"is_causal": True, "softcap": 30.0 if "softcap" in name else None}
        seconds: dict[str, list[float] | str] = {backend: [], "sdpa": []}
        for turn in range(2 + (3 if quick else ROUNDS)):
            for who in seconds:
                if isinstance(seconds[who], str):
                    continue
                try:
                    start = time.perf_counter()
                    attention(q, k, v, backend=who, **options)
                    if module is not None:
                        module.synchronize()
                    if turn >= 2:
                        seconds[who].append(time.perf_counter() - start)
                except Exception as error:
                    seconds[who] = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:80]
        rows.append((name, *(each if isinstance(each, str) else 1e3 * statistics.median(each) for each in seconds.values())))
    return rows


def page(backend: str, device: str, device_name: str, found: dict[str, str], suites: list[Suite], rows: list, communicator: str) -> str:
    """The page to send back, in Markdown. communicator: what is to be said of it beside its suite."""
    rehearsal = "" if backend == "ascend" else f"\n**A rehearsal with backend {backend} on {device}: it says nothing about Ascend.**\n"
    lines = [f"# npu-check: {device_name}, {datetime.date.today().isoformat()}", rehearsal,
             "\n".join(f"- {name}: {value}" for name, value in found.items()), "",
             "| suite | passed | skipped | failed | seconds | served by |", "|---|---|---|---|---|---|"]
    lines += [f"| {each.name} | {each.passed} | {each.skipped} | {each.failed} | {each.seconds:.0f} | {each.served} |" for each in suites]
    lines += ["", f"communicator: {communicator}", "", f"| fp16, causal | {backend} ms | sdpa ms |", "|---|---|---|"]
    shown = lambda figure: figure if isinstance(figure, str) else f"{figure:.3f}"
    lines += [f"| {' | '.join([name, *map(shown, times)])} |" for name, *times in rows]
    lines += [f"\n## {each.name}, last lines\n\n```\n{each.tail}\n```" for each in suites if each.tail]
    verdict = "all suites passed" if not any(each.failed for each in suites) else "there are failures"
    lines += ["", f"Verdict: {verdict}. Please open an issue with this page; with it `verified:` in the chip's profile can name a date."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few cases of each suite")
    parser.add_argument("--page", type=Path, metavar="FILE", help="where the page goes (default: npu_check_<date>.md here)")
    parser.add_argument("--rehearse", metavar="BACKEND", help="go through the motions with this backend on the CPU")
    args = parser.parse_args()
    backend, device = args.rehearse or "ascend", "cpu" if args.rehearse else "npu"
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    try:
        import torch

        from hetero_attn import registry
        from hetero_attn.backend import Backend
    except ImportError as error:
        print(f"npu-check cannot run here:\n  {error} in {sys.executable}\nit needs\n{NEEDS}\nverified: none, until it has run somewhere")
        return 3
    try:
        reasons = registry.get(backend).unavailable_reasons()
    except registry.UnknownBackendError as error:
        parser.error(str(error))
    if reasons:
        print(f"npu-check cannot run here:\n  {'; '.join(reasons)}\nit needs\n{NEEDS}\nverified: none, until it has run somewhere")
        return 3
    name = torch.npu.get_device_name(0) if device == "npu" else f"{platform.processor() or platform.machine()} (CPU)"
    target = args.page or Path(f"npu_check_{datetime.date.today().isoformat()}.md")
    if not target.parent.is_dir():
        parser.error(f"--page {target}: the folder {target.parent} does not exist")
    environment = {"HETERO_ATTN_TEST_BACKENDS": backend, "HETERO_ATTN_TEST_DEVICE": device,
                   "PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}:{ROOT / 'benchmarks'}", "HETERO_ATTN_TEST_COMMUNICATORS": backend,
                   "TORCH_DEVICE_BACKEND_AUTOLOAD": "0" if device == "cpu" else "1"}
    report = target.with_suffix(".xml")
    suites = []
    few = ["-k", "plain or is_available"] if args.quick else []
    runs = {"attention conformance": ["--pyargs", "hetero_attn.testing.test_attention", *few]}
    if not args.quick:
        runs["attention, random calls"] = ["--pyargs", "hetero_attn.testing.test_attention_hypothesis"]
    has_communicator = type(registry.get(backend)).communicator is not Backend.communicator
    collectives, communicator = None, "not run, this backend has none"
    if has_communicator:
        collectives, communicator = collectives_run(backend, torch.npu.device_count() if device == "npu" else 2, args.quick)
    if collectives:
        runs["collectives"] = collectives
    for title, arguments in runs.items():
        print(f"{title} ...", file=sys.stderr, flush=True)
        suites.append(run_suite(title, arguments, environment, report))
        report.unlink(missing_ok=True)
    print("timings ...", file=sys.stderr, flush=True)
    text = page(backend, device, name, versions(), suites, timings(backend, device, args.quick), communicator)
    target.write_text(text)
    print(text)
    print(f"written: {target}", file=sys.stderr)
    return 1 if any(each.failed for each in suites) else 0


if __name__ == "__main__":
    raise SystemExit(main())
