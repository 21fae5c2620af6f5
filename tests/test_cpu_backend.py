"""The cpu backend around its kernels: which instruction set serves and why, what it objects to, what becomes of it without a compiler.

Faults are seeded by a stand-in for a loaded object that changes one field of every call: the self-check must notice each.
"""

import ctypes
import dataclasses
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hetero_attn_cpu import CpuBackend, abi, calls, self_check
from hetero_attn_cpu.instruction_sets import BY_NAME, SETS, VARIABLE, InstructionSetError, asked, of_this_cpu
from hetero_attn_cpu.library import load
from hetero_attn_cpu.selection import select
from torch.utils._python_dispatch import TorchDispatchMode

from hetero_attn import attention, registry
from hetero_attn.jit import BuildError
from hetero_attn.spec import AttentionSpec, Operands

ROOT = Path(__file__).parents[1]
SPEC = AttentionSpec("cpu", torch.float32, 1, 4, 2, 8, 16, 64, 64, scale=0.125)


@pytest.fixture(scope="module")
def cpu() -> CpuBackend:
    backend = registry.get("cpu")
    if backend.unavailable_reasons():
        pytest.skip("; ".join(backend.unavailable_reasons()))
    return backend


def run(program: str, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=250, env=environment)


# -- reasons

@pytest.mark.parametrize(("change", "reason"), [
    ({"device": "cuda"}, "device is cuda, these kernels run on the cpu; move"),
    ({"dtype": torch.float64}, "dtype is float64, kernels have float32, float16, bfloat16; cast to float32"),
    ({"head_dim": 513}, "head_dim is 513, kernels have up to 512"), ({"v_head_dim": 600}, "v_head_dim is 600, kernels have up to 512"),
    ({"needs_grad": True}, "gradients or a torch.func transform (grad, vmap, jvp) are asked for, kernels have no backward"),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_objections_name_value_bound_and_remedy(change, reason):
    assert CpuBackend().unsupported_reasons(SPEC) == []
    found = CpuBackend().unsupported_reasons(dataclasses.replace(SPEC, **change))
    assert len(found) == 1 and found[0].startswith(reason)


def test_nothing_is_compiled_or_loaded_before_the_first_use(tmp_path):
    program = ("import hetero_attn, hetero_attn_cpu, torch; from hetero_attn import registry; b = registry.get('cpu'); b.kernels();"
               "b.unsupported_reasons; print([l for l in open('/proc/self/maps') if 'cpu-' in l and '.so' in l])")
    done = run(program, HETERO_ATTN_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stderr
    assert not (tmp_path / "cache").exists()


def test_without_a_compiler_sdpa_serves_and_says_why(tmp_path):
    program = "import torch, hetero_attn; q = torch.ones(1, 1, 2, 8); print(float(hetero_attn.attention(q, q, q).sum()))"
    done = run(program, HETERO_ATTN_CACHE_DIR=str(tmp_path), CXX="/nowhere/g++")
    assert done.stdout.strip() == "16.0", done.stderr
    assert "building" not in done.stderr
    assert "attention falls to sdpa" in done.stderr and "CXX is '/nowhere/g++'" in done.stderr and "install" in done.stderr
    assert "building" not in done.stderr.lower() or "falls to" in done.stderr


# -- which instruction set

def test_the_environment_names_one(monkeypatch):
    monkeypatch.setenv(VARIABLE, "portable")
    assert asked() is BY_NAME["portable"] and asked(of_this_cpu()[0].name) is of_this_cpu()[0]
    assert [kernel.arch for kernel in CpuBackend().kernels() if kernel.used_here] == ["portable"]
    monkeypatch.setenv(VARIABLE, "")
    assert asked() is None


def test_an_unknown_one_and_one_that_the_cpu_lacks_are_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "avx-512")
    wanted = rf"{VARIABLE} is 'avx-512': did you mean 'avx512'\? known are .*neon.*this CPU has .*portable"
    with pytest.raises(InstructionSetError, match=wanted):
        asked()
    foreign = next(each for each in SETS if each not in of_this_cpu())
    backend = CpuBackend(foreign.name)
    assert "this CPU" in backend.unavailable_reasons()[0] and foreign.name in backend.unavailable_reasons()[0]
    with pytest.raises(RuntimeError, match="backend 'cpu' does not run here: instruction set is"):
        backend.linear(torch.ones(2, 8), torch.ones(3, 8))


def test_what_a_cpu_lacks_is_named():
    avx512 = BY_NAME["avx512"]
    assert avx512.obstacle("x86_64", frozenset(avx512.features)) is None
    assert avx512.obstacle("x86_64", frozenset({*avx512.features} - {"avx512bw", "fma"})) == "lacks fma, avx512bw"
    assert avx512.obstacle("aarch64", frozenset()) == "is of another family (aarch64, expected x86_64 or amd64)"
    assert BY_NAME["portable"].obstacle("riscv64", frozenset()) is None


# -- self-check

class Faulty:
    """A loaded object that changes fields of each call: a kernel with a fault."""

    def __init__(self, library, instruction_set=None, attention=None, linear=None):
        self.library, self.parallel = library, library.parallel
        self.instruction_set = instruction_set or library.instruction_set
        self._changes = {"attention": attention or (lambda f: {}), "linear": linear or (lambda f: {})}

    def _run(self, what, table, packed):
        fields = abi.fields_of(table, packed)
        getattr(self.library, what)(abi.repacked(table, fields | self._changes[what](fields)))

    def attention(self, packed):
        self._run("attention", abi.ATTENTION, packed)

    def linear(self, packed):
        self._run("linear", abi.LINEAR, packed)


FAULTS = {
    "softcap ignored": lambda f: {"softcap": 0.0}, "scale off": lambda f: {"scale": f["scale"] * 1.05},
    "causality off by one": lambda f: {"right": f["right"] + 1} if f["right"] >= 0 else {},
    "window off by one": lambda f: {"left": f["left"] + 1} if f["left"] >= 0 else {},
    "sinks ignored": lambda f: {"sinks": 0}, "alibi ignored": lambda f: {"alibi": 0}, "mask ignored": lambda f: {"mask_dtype": 0},
    "lse not written": lambda f: {"lse": 0}, "a key forgotten": lambda f: {"kv_len": f["kv_len"] - 1} if not f["cu_q"] else {},
    "last value column forgotten": lambda f: {"v_head_dim": f["v_head_dim"] - 1},
    "pages in the wrong order": lambda f: {"table_stride": 0} if f["block_table"] else {},
    "fp16 read as bf16": lambda f: {"dtype": 3} if f["dtype"] == 2 else {},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_self_check_notices(fault, cpu):
    assert self_check.objections(Faulty(cpu._library), cpu._library) == []
    assert self_check.objections(Faulty(cpu._library, attention=FAULTS[fault]), cpu._library)


@pytest.mark.parametrize("change", [{"bias": 0}, {"k": -1}, {"n": -1}, {"m": -1}], ids=str)
def test_the_self_check_notices_a_wrong_product(change, cpu):
    wrong = Faulty(cpu._library, linear=lambda f: {name: f[name] + by if by else 0 for name, by in change.items()})
    assert self_check.objections(wrong, cpu._library)


@pytest.mark.parametrize("each", of_this_cpu(), ids=lambda each: each.name)
def test_every_set_passes_the_self_check(each):
    trusted = load(BY_NAME["portable"])
    assert self_check.objections(load(each), trusted) == []


def test_an_unverified_set_serves_only_if_it_passes(cpu, monkeypatch):
    best = of_this_cpu()[0]
    unverified = dataclasses.replace(best, name="untried", verified=None)
    monkeypatch.setitem(BY_NAME, "untried", unverified)
    monkeypatch.setattr("hetero_attn_cpu.selection.of_this_cpu", lambda: [unverified, BY_NAME["portable"]])

    def loader(fault):
        return lambda each: Faulty(load(best if each is unverified else each), each, attention=fault if each is unverified else None)

    good = select(None, loader(None))
    assert good.library.instruction_set is unverified and "verified on no real CPU yet" in good.notes[0] and "passed here" in good.notes[0]
    bad = select(None, loader(FAULTS["softcap ignored"]))
    assert bad.library.instruction_set is BY_NAME["portable"] and bad.reasons == ()
    assert any(note.startswith("not used: untried: verified on no real CPU, and its check failed here") for note in bad.notes)
    named = select("untried", loader(FAULTS["softcap ignored"]))
    assert named.library is None and "its check failed here" in named.reasons[0]


def test_what_cannot_be_built_is_passed_over_with_a_note(cpu):
    best = of_this_cpu()[0]

    def old_compiler(each):
        if each is best and len(of_this_cpu()) > 1:
            raise BuildError("kernel x: compiling failed with exit code 1\ncommand: g++")
        return load(BY_NAME["portable"])

    chosen = select(None, old_compiler)
    assert chosen.library and (len(of_this_cpu()) == 1 or "not used: kernel x: compiling failed with exit code 1" in chosen.notes)


def test_doctor_shows_the_notes(cpu):
    from hetero_attn.cli.doctor import as_text, diagnosis

    report = diagnosis("cpu", [])
    assert next(b for b in report["backends"] if b["name"] == "cpu")["notes"] == cpu.notes()
    assert f"kernels for {cpu._library.instruction_set.name}, verified on" in as_text(report)


# -- calls

class Operations(TorchDispatchMode):
    """Every torch operation that ran inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("stride", [1, 2], ids=["unit", "gaps"])
def test_no_copy_of_q_k_or_v_is_made(cpu, stride):
    q, k = (torch.randn(1, *sizes, 64 * stride)[..., ::stride].transpose(1, 2) for sizes in ((9, 4), (30, 2)))
    with Operations() as seen:
        out, _ = cpu.attention(q, k, k, dataclasses.replace(SPEC, q_len=9, kv_len=30, layout="bshd"), Operands())
    assert set(seen.names) <= {"aten.empty.memory_format", "aten.transpose.int"}, seen.names
    assert out.transpose(1, 2).is_contiguous(), "the caller holds bshd"
    torch.testing.assert_close(out, attention(q, k, k, backend="reference"))


def test_the_kernels_make_no_copy_of_keys_either():
    """K and V of 128 MB with gaps: the process may not grow by a fraction of that."""
    program = ("import torch, resource; from hetero_attn import attention; k = torch.ones(1, 1, 2**18, 128, dtype=torch.float16)[..., ::2];"
               "q = torch.ones(1, 1, 40, 64, dtype=torch.float16); attention(q[:, :, :4], k[:, :, :99], k[:, :, :99], backend='cpu');"
               "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak();"
               "attention(q, k, k, backend='cpu'); attention(q[:, :, :1], k, k, backend='cpu'); print(peak() - before)")
    done = run(program)
    assert done.returncode == 0 and int(done.stdout) < 16 * 1024, (done.stdout, done.stderr)


def test_strides_beyond_32_bits(cpu):
    room = mmap.mmap(-1, 13 * 2**30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    flat = torch.frombuffer(room, dtype=torch.float16)
    far = torch.as_strided(flat, (1, 2, 5, 16), (0, 2**32 + 7, 2**30 // 2 + 1, 1))          # two heads 8 GiB apart, tokens 1 GiB
    near = torch.randn(1, 2, 5, 16, dtype=torch.float16)
    far.copy_(near)
    for q_len in (1, 30):
        q = torch.randn(1, 4, q_len, 16, dtype=torch.float16)
        assert torch.equal(attention(q, far, far, backend="cpu"), attention(q, near, near, backend="cpu"))
    assert torch.equal(cpu.linear(near[0, 0], far[0, 1]), cpu.linear(near[0, 0], near[0, 1]))


def test_negated_views_and_another_default_device(cpu):
    q, k = torch.randn(1, 4, 8, 64), torch.randn(1, 2, 16, 64)
    want = attention(q, -k, k, backend="cpu")
    assert torch.equal(attention(q, torch._neg_view(k), k, backend="cpu"), want)
    with torch.device("meta"):
        assert torch.equal(cpu.attention(q, -k.clone(), k, SPEC, Operands())[0], want)


@pytest.mark.parametrize("scale", [1e39, -1e300, 1e-300])
def test_scales_beyond_fp32(scale):
    q = torch.zeros(1, 1, 2, 8)
    assert torch.equal(attention(q, q, q + 1, scale=scale, backend="cpu"), q + 1)


@pytest.mark.parametrize("q_len", [1, 20])                              # both kernels
@pytest.mark.parametrize(("softcap", "like"), [(1e-300, 1e-30), (1e-45, 1e-30), (1e300, None)])
def test_softcaps_beyond_fp32(softcap, like, q_len, cpu):
    q, kv = torch.randn(1, 2, q_len, 16), torch.randn(1, 2, 30, 16)
    torch.testing.assert_close(attention(q, kv, kv, softcap=softcap, backend="cpu"), attention(q, kv, kv, softcap=like, backend="cpu"))


def test_linear_leaves_to_torch_what_it_cannot(cpu, monkeypatch):
    seen = []
    monkeypatch.setattr(calls, "linear", lambda library, *arguments: seen.append(arguments))
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    graded = cpu.linear(x, weight.clone().requires_grad_())
    assert graded.requires_grad
    cpu.linear(x.double(), weight.double())
    cpu.linear(x, torch.randn(8, 5).t())
    cpu.linear(x[:0], weight)
    torch.vmap(lambda row: cpu.linear(row, weight))(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cpu.linear(x, weight).dtype == torch.bfloat16
    for wrong in ((x, weight[:, :7]), (x, weight.half()), (x, weight, torch.ones(4))):
        with pytest.raises(RuntimeError):
            cpu.linear(*wrong)
    assert not seen
    with torch.no_grad():
        cpu.linear(x, weight.clone().requires_grad_())
    assert len(seen) == 1


def test_linear_of_any_shape(cpu):
    weight, bias = torch.randn(5, 8), torch.randn(5)
    plain = torch.randn(8), torch.randn(2, 3, 8)
    for x in (*plain, torch.randn(3, 2, 8).transpose(0, 1), torch.randn(8, 4).t(), torch.randn(3, 16)[:, ::2]):
        want = torch.nn.functional.linear(x, weight, bias)
        torch.testing.assert_close(cpu.linear(x, weight, bias), want)
        out = torch.empty_like(want)
        assert cpu.linear(x, weight, bias, out) is out
        torch.testing.assert_close(out, want)


def test_a_refused_call_is_an_error(cpu):
    from hetero_attn_cpu.library import CallError

    fields = dict.fromkeys((name for name, _, _ in abi.LINEAR), 0) | {"abi_version": abi.ABI_VERSION + 1, "dtype": 1}
    with pytest.raises(CallError, match="another ABI version"):
        cpu._library.linear(abi.repacked(abi.LINEAR, fields))
    with pytest.raises(CallError, match="unknown dtype"):
        cpu._library.linear(abi.repacked(abi.LINEAR, fields | {"abi_version": abi.ABI_VERSION, "dtype": 5}))
    assert ctypes.sizeof(ctypes.c_void_p) == 8
