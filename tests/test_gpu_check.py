"""make gpu-check without a GPU: it says what it needs, its arithmetic and its page are right, and a rehearsal runs it on the CPU."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hetero_attn.parallel import offload
from hetero_attn.testing.attention_cases import attention_cases
from hetero_attn.testing.gpu import attention_bench, checks, children, conform, cooperation, graphs, groups, norm_bench
from hetero_attn.testing.gpu import ceilings as limits
from hetero_attn.testing.gpu.__main__ import NO_DEVICE, main, need
from hetero_attn.testing.gpu.ceilings import Ceilings
from hetero_attn.testing.gpu.clock import medians
from hetero_attn.testing.gpu.graph_seam import Repeated
from hetero_attn.testing.gpu.outcome import BELOW, FAILED, PASSED, SKIPPED, Figure, Outcome, judged
from hetero_attn.testing.gpu.page import page_path, text_of, written

CPU, ROOT = torch.device("cpu"), Path(__file__).parents[1]
without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@without_a_gpu
def test_says_in_one_line_what_it_needs(tmp_path):
    command = [sys.executable, "-m", "hetero_attn.testing.gpu", "--page", str(tmp_path / "page.md")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == NO_DEVICE == 3 and len(done.stdout.splitlines()) == 1 and not list(tmp_path.iterdir())
    assert "gpu-check needs a GPU that torch sees (CUDA or ROCm), its driver, and triton; here torch" in done.stdout and need()


def test_checks_are_chosen_by_name(capsys):
    assert [check.name for check in checks.selected(None)] == [check.name for check in checks.CHECKS]
    assert [check.name for check in checks.selected("norm, twin")] == ["twin", "norm"]
    with pytest.raises(ValueError, match="no check is called speed; there are conformance, twin, alone, mixed, collectives, graphs"):
        checks.selected("norm,speed")
    with pytest.raises(ValueError, match="it names no check"):
        checks.selected(" ,")
    with pytest.raises(SystemExit) as wrong:
        main(["--only", "speed"])
    assert wrong.value.code == 2 and "no check is called speed" in capsys.readouterr().err
    assert main(["--list"]) == 0 and "two processes on one GPU" in capsys.readouterr().out


def test_bad_places(tmp_path, capsys):
    away = str(tmp_path / "away" / "x.md")
    for arguments, words in ((["--rehearse"], "name a --page"), (["--rehearse", "--page", away], "does not exist")):
        with pytest.raises(SystemExit) as wrong:
            main(arguments)
        assert wrong.value.code == 2 and words in capsys.readouterr().err


def test_arithmetic():
    assert limits.product_tflops(8192, 2 * 8192**3 / 1e15) == pytest.approx(1000)
    assert limits.copy_gbps(1 << 30, 2 * (1 << 30) / 3e12) == pytest.approx(3000)
    assert limits.attention_flop(2, 4, 8, 8, 16, False) == 4 * 2 * 4 * 16 * 64
    assert limits.attention_flop(1, 1, 4, 4, 1, True) == 4 * (1 + 2 + 3 + 4)
    assert limits.attention_flop(1, 1, 2, 5, 1, True) == 4 * (4 + 5) and limits.attention_flop(1, 1, 5, 2, 1, True) == 4 * (1 + 2)
    assert limits.decode_bytes(8, 8, 8192, 128, 2) == 2 * 8 * 8 * 8192 * 128 * 2 and limits.norm_bytes(64, 8192, 2) == 4 * 64 * 8192 * 2
    found = Ceilings(500.0, 2500.0)
    assert found.of_rate(250) == 0.5 and found.of_bandwidth(2000) == 0.8


def test_bars():
    pair = {"triton": 2.0, attention_bench.FLEX: 3.0, attention_bench.CHOSEN: 2.0, attention_bench.SDPA: 1.0}
    wanted = [("triton", attention_bench.FLEX, 1.0), (attention_bench.CHOSEN, attention_bench.SDPA, 1.0)]
    figures, missing = attention_bench.ratios("p", pair, wanted)
    assert not missing and [(figure.what, figure.value, figure.reached) for figure in figures] == [
        ("p: triton over FlexAttention", 1.5, True), ("p: chosen over torch SDPA", 0.5, False)]
    lacking = {"triton": "RuntimeError: no", attention_bench.FLEX: 1.0, attention_bench.CHOSEN: 1.0}
    assert attention_bench.ratios("p", lacking, wanted) == ([], [
        "p: triton over FlexAttention: bar not measured: triton: RuntimeError: no",
        "p: chosen over torch SDPA: bar not measured: torch SDPA: it was not put to the clock"])
    assert judged("", figures[:1], [], ["p: bar not measured"]).status == FAILED
    assert judged("", figures, []).status == BELOW and judged("", figures[:1], []).status == PASSED
    assert str(figures[1]) == "p: chosen over torch SDPA: 0.5 x (below its bar of 1)" and Figure("x", 2, "GB/s").reached


def test_a_failing_contender_keeps_its_words():
    def fails():
        raise RuntimeError("no kernel\nmore")

    found = medians({"good": lambda: torch.ones(4).sum(), "bad": fails}, CPU, 3)
    assert isinstance(found["good"], float) and found["bad"] == "RuntimeError: no kernel"


def test_children_are_collected():
    said = '{"passed": 5, "objected": 2, "failures": 1, "seconds": 3.0, "failed": {"x": "y"}}'
    done = subprocess.CompletedProcess([], 1, f"noise\n{said}\n", "")
    found, line = checks.collected("triton", done)
    assert found["failed"] == {"x": "y"} and line == "triton: 5 passed, 2 objected to, 1 failed in 3.0 s"
    found, line = checks.collected("triton", subprocess.CompletedProcess([], -11, "", "a\nb\nCUDA error: an illegal memory access\n"))
    assert found == {} and line == "triton: the process ended with -11: a | b | CUDA error: an illegal memory access"


def test_whatever_a_check_raises_is_its_outcome():
    def fails(run):
        raise RuntimeError("out of memory")

    outcome = checks.carried_out(checks.Check("x", "", fails), checks.Run(CPU))
    assert outcome.status == FAILED and outcome.text.startswith("RuntimeError: out of memory") and outcome.seconds >= 0

    def late(run):
        raise subprocess.TimeoutExpired("x", 5)

    assert checks.carried_out(checks.Check("x", "", late), checks.Run(CPU)).text == "no end after 5 s"


def test_the_suite_without_pytest():
    found = conform.conform("sdpa", "cpu", conform.cases_of(1, True))
    assert found["failures"] == 0 and found["passed"] > 10
    few = {case.name for case in conform.cases_of(1, True)}
    assert {"plain-fp16", "causal-5x49-fp32", "everything-49x5-bf16"} <= few
    assert len(conform.cases_of(9, False)) < len(attention_cases()) // 8


def test_a_faulty_backend_fails_the_suite():
    from hetero_attn import registry
    from hetero_attn.reference import ReferenceBackend

    class Doubles(ReferenceBackend):
        name = "doubles"

        def attention(self, q, k, v, spec, operands):
            out, lse = super().attention(q, k, v, spec, operands)
            return out * 2, lse

    with registry.register("doubles", Doubles):
        found = conform.conform("doubles", "cpu", conform.cases_of(1, True)[:6])
    assert found["failures"] >= 3 and "numbers are off" in next(iter(found["failed"].values()))


def test_groups_on_the_cpu():
    assert groups.alone(CPU).status == PASSED
    outcome = groups.twin(CPU, "nothing")
    assert outcome.status == SKIPPED and "there is no backend 'nothing' here; known are " in outcome.text


def test_the_groups_check_sees_a_fault():
    from hetero_attn.communicator import SoloCommunicator

    class Forgets(SoloCommunicator):
        def reduce_add_norm(self, call):
            normed, residual = super().reduce_add_norm(call)
            return normed * 1.1, residual

    with Forgets() as communicator:
        assert "norm: " in groups.complaints(communicator, CPU, rows=(7,), widths=(64,))[0]


@pytest.mark.ranks
def test_a_group_of_two():
    outcome = groups._ranks(groups.groups_of(CPU)[2], (64,))
    assert outcome.status == PASSED and "DistributedCommunicator on cpu, cpu, 15 shapes and dtypes" in outcome.text


@pytest.mark.ranks
def test_the_fused_norm_is_timed():
    assert groups.fused(CPU, "nothing").status == SKIPPED
    outcome = groups.fused(CPU, "distributed")
    assert outcome.status == PASSED, outcome.text
    assert [row[0] for row in outcome.table[1:]] == ["1", "2"] and all(float(row[3]) > 0 and float(row[4]) > 0 for row in outcome.table[1:])


def test_graphs_need_cuda():
    assert graphs.graphs(CPU).text == "cpu has no CUDA graphs"


def test_captured_calls_by_the_stand_in(monkeypatch):
    """Each call through the seam; a call that a backend objects to is no failure, what a capture turns up is."""
    for make in graphs.CALLS.values():
        assert graphs.verdict("sdpa", make, CPU, Repeated()) == graphs.RIGHT
    assert graphs.verdict("hopper", graphs.CALLS["decode over pages"], CPU, Repeated()) == graphs.OBJECTED
    monkeypatch.setattr(Repeated, "captured", lambda self, call: (call(), lambda: None))
    assert "DIFFERS" in graphs.verdict("sdpa", graphs.CALLS["prefill"], CPU, Repeated())


def test_benchmarks_on_the_cpu():
    found = Ceilings(0.1, 10.0)
    outcomes = [run(CPU, found, True) for run in (attention_bench.prefill, attention_bench.decode, norm_bench.norm)]
    for outcome in outcomes:
        assert outcome.status in (PASSED, BELOW) and len(outcome.table) > 2
        assert outcome.text.startswith(("1 shapes", "2 shapes", "hidden 64"))
    assert {row[1] for row in outcomes[0].table} >= {"sdpa", attention_bench.SDPA, attention_bench.CHOSEN}


def test_the_page():
    outcomes = {"conformance": Outcome(FAILED, "triton: 5 passed\n  a|b: off", seconds=3.4), "graphs": Outcome(SKIPPED, "no CUDA graphs"),
                "norm": judged("hidden 8192", [Figure("1024 tokens", 0.7, "", 0.8)], [("tokens", "us"), ("64", "3")])}
    text = text_of("NVIDIA H100", {"torch": "2.13.0"}, outcomes, quick=False, rehearsal=False)
    assert text.startswith("# NVIDIA H100: gpu-check\n") and "| conformance | **failed** | 3 | triton: 5 passed |" in text
    assert "| norm | **below its bar** | 0 | hidden 8192 |" in text and "- 1024 tokens: 0.7  (below its bar of 0.8)" in text
    assert "- a|b: off" in text and "| tokens | us |\n|---|---|\n| 64 | 3 |" in text and "torch 2.13.0." in text and "rehearsal" not in text
    assert page_path("NVIDIA H100 80GB HBM3").parts[-3:] == ("docs", "measured", "nvidia_h100_80gb_hbm3.md")


def test_a_page_is_written_in_one_step(tmp_path):
    written(tmp_path / "page.md", "one")
    written(tmp_path / "page.md", "two")
    assert (tmp_path / "page.md").read_text() == "two" and [path.name for path in tmp_path.iterdir()] == ["page.md"]


def test_a_gpu_without_triton_fails(monkeypatch):
    """Where the kernels must run, an unavailable backend is a failure, and so are its bars."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    cuda = torch.device("cuda", 0)
    assert attention_bench.needs_triton(cuda) and not attention_bench.needs_triton(CPU)
    assert [bar[:2] for bar in attention_bench.bars(attention_bench.PREFILL[-1], cuda)] == [("triton", attention_bench.FLEX)]
    monkeypatch.setattr(checks.registry, "names", lambda: ["triton", "reference"])
    monkeypatch.setattr(checks.registry, "unavailable", lambda backend: ["a small call failed: RuntimeError: no"])
    outcome = checks.conformance(checks.Run(cuda))
    assert outcome.status == FAILED and outcome.text.startswith("triton: must run here and does not: a small call failed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    assert not attention_bench.needs_triton(cuda) and "triton: not here" in checks.conformance(checks.Run(cuda)).text


def test_a_contender_that_fails_keeps_its_words(monkeypatch):
    def fails(*args, backend=None, **options):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(attention_bench, "attention", fails)
    shape = attention_bench.REHEARSAL["prefill"][0]
    found = medians(attention_bench.contenders(shape, CPU, False), CPU, 1)
    assert found["sdpa"] == "RuntimeError: illegal memory access"


def test_children_are_killed_with_their_children(tmp_path):
    """A child that does not end goes with what it started, and what it had said is kept."""
    program = tmp_path / "stays.py"
    program.write_text("import subprocess, sys, time\n"
                       "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
                       "print(child.pid, flush=True)\ntime.sleep(60)\n")
    began = time.monotonic()
    done = children.child("stays", [], 15.0, environment={"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))})
    assert done.returncode == -9 and time.monotonic() - began < 40
    grandchild = int(done.stdout)
    for _ in range(100):
        state = Path(f"/proc/{grandchild}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child's own child still runs")


def test_a_tool_may_run_a_child(tmp_path):
    """As compute-sanitizer does: in a process of its own making, whose parent is the tool."""
    (tmp_path / "says.py").write_text("import sys\nprint('said', *sys.argv[1:])\n")
    places = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = children.child("says", ["this"], 60.0, ("sh", "-c", '"$@"; exit 9', "sh"), {"PYTHONPATH": places})
    assert (done.returncode, done.stdout) == (9, "said this\n"), done.stderr


def test_parts_and_time(monkeypatch):
    assert conform.part_of("1/4") == (1, 4)
    for text in ("4/4", "x", "-1/2"):
        with pytest.raises(ValueError):
            conform.part_of(text)
    run = checks.Run(CPU, deadline=time.monotonic() - 1)
    assert "the run's time is up; --minutes gives it more" in checks.carried_out(checks.Check("x", "", lambda run: run.left_s()), run).text
    half = '{"passed": 20, "objected": 0, "failures": 0, "seconds": 3.0, "failed": {}, "whole": false}'
    found, line = checks.collected("triton", subprocess.CompletedProcess([], -9, half, ""))
    assert found["passed"] == 20
    assert line == "triton: 20 passed, 0 objected to, 0 failed in 3.0 s, then the process ended with -9: it said nothing"


SMALL = dataclasses.replace(cooperation.REHEARSAL, context=128, new=2)


def test_cooperation_is_compared_with_all_on_the_device():
    """What a GPU will be held to, on the CPU: the same bits, a budget kept, copies and the host's attention that did happen."""
    outcome = cooperation.compared(CPU, SMALL)
    assert outcome.status == PASSED and "cpu attends on the cpu device" in outcome.text, outcome.text
    head, *rows = outcome.table
    cells = [dict(zip(head, row)) for row in rows]
    assert [cell["layers on the host"] for cell in cells] == ["0 of 6", "3 of 6", "6 of 6"]
    assert all(cell["logits apart"] == "0.0e+00" for cell in cells) and cells[0]["fetched"] == "0 B" != cells[1]["fetched"]
    assert {figure.what.split(":")[0] for figure in outcome.figures} == {"half", "all-host"} and len(outcome.figures) == 6


@pytest.mark.parametrize("fault, words", [
    ("copies", "logits of the prompt differ by"), ("host-attention", "logits of the decoding differ by"),
    ("budget", "of the device were held, its budget is"), ("nothing", "so nothing was compared"),
], ids=["copies", "host-attention", "budget", "nothing"])
def test_a_fault_in_cooperation_fails_the_check(monkeypatch, fault, words):
    if fault == "copies":
        monkeypatch.setattr(offload, "_copy_runs", lambda into, source, runs: [each.zero_() for each in into])
    elif fault == "host-attention":
        right = offload.HostLayers._attend_on_host
        monkeypatch.setattr(offload.HostLayers, "_attend_on_host", lambda self, *call: right(self, *call) * 1.01)
    elif fault == "budget":
        monkeypatch.setattr(cooperation, "alone", lambda *arguments: 1 << 40)
    else:
        monkeypatch.setattr(cooperation, "limits", lambda decoder, tokens: dict.fromkeys(("all-device", "half", "all-host"), (0, None)))
    outcome = cooperation.compared(CPU, SMALL)
    assert outcome.status == FAILED and words in outcome.text, outcome.text


def without(folder, *packages):
    """A PYTHONPATH on which packages are absent."""
    for package in packages:
        (folder / "absent" / package).mkdir(parents=True)
        (folder / "absent" / package / "__init__.py").write_text(f"raise ModuleNotFoundError('no', name={package!r})")
    root = Path(__file__).parents[1]
    return os.pathsep.join(map(str, (folder / "absent", root, root / "backends")))


def test_a_missing_package_is_named(tmp_path):
    done = subprocess.run([sys.executable, "-m", "hetero_attn.testing.gpu", "--list"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": without(tmp_path, "safetensors")})
    assert done.returncode == NO_DEVICE and done.stdout.startswith("gpu-check needs safetensors, which is not installed here; ")


@pytest.mark.ranks
def test_a_rehearsal(tmp_path):
    """Every check through the command itself: conformance in children, ranks, benchmarks, page and JSON; with none of the packages that a
    bare machine may lack."""
    names = "conformance,mixed,collectives,graphs,replays,sanitizer,ceilings,prefill"
    arguments = ["--rehearse", "--quick", "--only", names, "--page", str(tmp_path / "page.md")]
    root, places = Path(__file__).parents[1], without(tmp_path, "pytest", "hypothesis", "transformers", "tokenizers")
    done = subprocess.run([sys.executable, "-m", "hetero_attn.testing.gpu", *arguments, "--json", str(tmp_path / "found.json")],
                          capture_output=True, text=True, cwd=root, timeout=280, env=os.environ | {"PYTHONPATH": places})
    found = json.loads((tmp_path / "found.json").read_text())
    statuses = {name: each["status"] for name, each in found["checks"].items()}
    for name in ("conformance", "mixed", "collectives", "replays", "ceilings"):
        assert statuses[name] == PASSED, done.stdout + done.stderr
    assert statuses["graphs"] == statuses["sanitizer"] == SKIPPED and statuses["prefill"] in (PASSED, BELOW) and found["rehearsal"]
    assert "sdpa: " in found["checks"]["conformance"]["text"] and "triton: not here: " in found["checks"]["conformance"]["text"]
    assert "A rehearsal on a CPU" in (tmp_path / "page.md").read_text() and done.returncode == (BELOW in statuses.values())
