"""The volta backend's contract: what it objects to and in which words, on machines with and without a V100, and what it launches."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hetero_attn_volta import VoltaBackend, calls
from hetero_attn_volta.kernels import COMBINE, cubins, source_of, sources
from hetero_attn_volta.launching import CudaLauncher, torch_build_reasons
from hetero_attn_volta.tiling import VARIANTS
from native import needs_compiler
from volta_emulated import NAME, volta_emulated

import hetero_attn
from hetero_attn import registry
from hetero_attn.cli import main
from hetero_attn.cubin import nvrtc_reason
from hetero_attn.profile import load_profile
from hetero_attn.spec import AttentionSpec
from hetero_attn.testing.simt import SimtLauncher
from hetero_attn.testing.tolerances import assert_close

SPEC = AttentionSpec("cuda", torch.float16, 1, 32, 8, 4096, 4096, 128, 128, is_causal=True, scale=0.088)
ROOT = Path(__file__).parents[1]


def half(*shape):
    return torch.randn(*shape, dtype=torch.float16)


@pytest.mark.parametrize(("changes", "words"), [
    ({"dtype": torch.bfloat16}, "dtype is bfloat16, kernel has float16 only (Volta has no bf16 tensor cores); cast to float16"),
    ({"dtype": torch.float32}, "dtype is float32, kernel has float16 only; cast to float16, or use backend 'sdpa'"),
    ({"device": "cpu"}, "device is cpu, these kernels run on cuda; move the tensors there"),
    ({"head_dim": 257}, "head_dim is 257, kernel has up to 256; use backend 'sdpa'"),
    ({"v_head_dim": 512}, "v_head_dim is 512, kernel has up to 256; use backend 'sdpa'"),
    ({"needs_grad": True}, "gradients are needed, kernel has no backward; use backend 'sdpa', or torch.no_grad() if they are not"),
])
def test_objections(changes, words):
    assert VoltaBackend().unsupported_reasons(replace(SPEC, **changes)) == [words]


def test_no_objection_to_what_it_runs():
    backend = VoltaBackend()
    for changes in ({}, {"q_len": 1}, {"varlen": True, "page_size": 16}, {"mask": torch.bool}, {"head_dim": 13, "v_head_dim": 200},
                    {"softcap": 30.0, "alibi": 2, "sinks": True, "window_size": (5, 0), "return_lse": True}):
        assert backend.unsupported_reasons(replace(SPEC, **changes)) == []


def test_what_a_v100_owner_reads(capsys):
    """The command line that the README shows, judged where there is no V100."""
    arguments = ["explain", "--q", "1,32,4096,128", "--kv", "1,8,4096,128", "--dtype", "bfloat16", "--causal", "--profile", "v100"]
    main([*arguments, "--set", "strict=true"])
    out = capsys.readouterr().out
    assert "q [1, 32, 4096, 128]  kv [1, 8, 4096, 128]  bfloat16  causal  cuda" in out
    assert "dtype is bfloat16, kernel has float16 only (Volta has no bf16 tensor cores); cast to float16" in out
    assert "excluded by strict: true" in out
    main([*arguments, "--json"])
    judged = {each["name"]: each for each in json.loads(capsys.readouterr().out)["backends"]}
    assert judged["volta"]["listed"] and not judged["volta"]["supported"] and judged["sdpa"]["supported"]


def test_strict_refusal_is_the_designs():
    profile = load_profile("v100", sets=["strict=true"])
    with pytest.raises(hetero_attn.UnsupportedError) as refusal:
        registry.first_without_objection(replace(SPEC, dtype=torch.bfloat16), profile)
    lines = str(refusal.value).splitlines()
    assert lines[0] == "no backend of profile 'v100' (strict) runs this attention"
    assert lines[1] == "  q [1, 32, 4096, 128]  kv [1, 8, 4096, 128]  bfloat16  causal  cuda"
    assert any(line.startswith("  volta") for line in lines) and lines[-2].endswith("sdpa   excluded by strict: true")
    assert "        dtype is bfloat16, kernel has float16 only (Volta has no bf16 tensor cores); cast to float16" in str(refusal.value) or \
        "volta  dtype is bfloat16" in str(refusal.value)


@pytest.mark.parametrize(("cuda", "arches", "capability", "words"), [
    ("12.6", ["sm_50", "sm_70", "sm_90"], (7, 0), None),
    ("12.8", ["sm_75", "sm_90"], (7, 0), "torch is built for CUDA 12.8 without sm_70 (wheels for CUDA 12.8 from torch 2.11 on, and all for "
     "CUDA 13, dropped it); a V100 needs a build for CUDA 12.6: install torch's cu126 wheel"),
    ("13.0", ["sm_75", "sm_120"], (7, 0), "torch is built for CUDA 13.0 without sm_70"),
    ("13.0", ["sm_75", "sm_90"], (9, 0), None),
    ("12.6", ["sm_50", "sm_70"], (6, 1), "device has compute capability 6.1, kernels need 7.0 (tensor cores); use backend 'sdpa'"),
])
def test_builds_of_torch(cuda, arches, capability, words):
    reasons = torch_build_reasons(cuda, arches, capability)
    assert (reasons == []) if words is None else reasons[0].startswith(words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_the_reason_names_the_wheel():
    reasons = CudaLauncher().unavailable_reasons()
    assert len(reasons) == 1
    if torch.version.cuda is None:
        assert "CUDA 12.6" in reasons[0] and "cu126" in reasons[0]


def test_its_cubins_are_declared_for_sm_70():
    declared = VoltaBackend().kernels()
    assert {kernel.arch for kernel in declared} == {"sm_70"} and len(declared) == len(sources()) == len(VARIANTS) + 1
    assert len({kernel.name for kernel in declared}) == len(declared)
    assert all(kernel.name.endswith("-sm_70") for kernel in declared)


@pytest.mark.skipif(nvrtc_reason() is not None, reason=nvrtc_reason() or "")
def test_build_makes_a_cubin_without_a_gpu(tmp_path, monkeypatch, capsys):
    """hetero-attn build --arch sm_70, for one kernel of the list; all are compiled in test_volta_cubins.py."""
    monkeypatch.setattr(VoltaBackend, "kernels", lambda self: [COMBINE.cubin("sm_70")])
    monkeypatch.setitem(registry._instances, "volta", VoltaBackend())
    arguments = ["build", "--arch", "sm_70", "--backend", "volta", "--into", str(tmp_path / "made")]
    assert main([*arguments, "--json"]) == 0
    row, = json.loads(capsys.readouterr().out)["kernels"]
    assert row["state"] == "built" and row["arch"] == "sm_70" and Path(row["path"]).read_bytes()[:4] == b"\x7fELF"
    assert main(arguments) == 0
    assert "volta-combine-sm_70  sm_70  " in capsys.readouterr().out


def test_importing_it_loads_no_cupy():
    code = "import sys, hetero_attn_volta; hetero_attn_volta.backend().unavailable_reasons(); assert 'cupy' not in sys.modules"
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


def test_cupy_has_what_the_launcher_calls():
    """Against the real package where it is installed (it imports without a GPU): names, a struct by value as an array, CUDA 12."""
    cupy = pytest.importorskip("cupy", reason="cupy-cuda12x is not installed (pip install 'hetero-attn[cuda12]')")
    from cupy.cuda import function

    assert hasattr(function, "CNumpyArray") and hasattr(cupy.RawKernel, "max_dynamic_shared_size_bytes")
    assert "path (str)" in cupy.RawModule.__doc__ and cupy.cuda.runtime.runtimeGetVersion() // 1000 == 12
    assert cupy.cuda.ExternalStream(0, 0).ptr == 0
    if not torch.cuda.is_available():
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
            cupy.RawModule(path="absent.cubin").get_function("volta_forward")


@needs_compiler
@pytest.mark.parametrize("changes", [{}, {"batch": 5, "q_len": 2, "kv_len": 600}])
def test_long_batches_go_in_parts(monkeypatch, changes):
    """A grid is at most 65535 sequences deep; here 2."""
    monkeypatch.setattr(calls, "BATCH_STEP", 2)
    B, Sq, Skv = changes.get("batch", 5), changes.get("q_len", 40), changes.get("kv_len", 50)
    q, k, v = half(B, 2, Sq, 32), half(B, 1, Skv, 32), half(B, 1, Skv, 32)
    with volta_emulated() as launcher:
        out, lse = hetero_attn.attention(q, k, v, is_causal=True, return_lse=True, backend=NAME)
    names = [function for function, _ in launcher.launched]
    assert names[:3] == [names[0]] * 3 and len(names) == (4 if "volta_combine" in names else 3)
    want, want_lse = hetero_attn.attention(q.double(), k.double(), v.double(), is_causal=True, return_lse=True, backend="reference")
    assert_close(out, want, torch.float16)
    assert_close(lse, want_lse, torch.float16, "lse")


@needs_compiler
def test_a_tiny_call_is_what_makes_it_available(monkeypatch):
    class Broken(SimtLauncher):
        probes = True

        def launch(self, *arguments):
            raise RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU:\nno kernel image")

    class Idle(Broken):
        def launch(self, *arguments):
            pass

    assert VoltaBackend(SimtLauncher()).probe() == []
    assert VoltaBackend(Broken()).unavailable_reasons() == \
        ["a tiny call failed: RuntimeError: CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image"]
    monkeypatch.setattr(torch, "empty", torch.zeros)
    assert VoltaBackend(Idle()).unavailable_reasons()[0].startswith("a tiny call gave 0.0 and not 1; ")


@needs_compiler
def test_unaligned_rows_take_the_slow_way_and_aligned_ones_do_not():
    """Counted: 16-byte loads where every row begins at a multiple of 16 bytes, 2-byte ones where not; never a misaligned access."""
    with volta_emulated(SimtLauncher(counted=True)) as launcher:
        def widths(q, k, v):
            hetero_attn.attention(q, k, v, backend=NAME)
            return {width for space, way, width in launcher.launched[-1][1].traffic if (space, way) == ("global", "load")}

        q, k, v = half(1, 2, 40, 64), half(1, 2, 40, 64), half(1, 2, 40, 64)
        assert widths(q, k, v) == {16}
        assert widths(q, half(1, 2, 40, 65)[..., 1:], v) == {2, 16}
        assert widths(*(half(1, 2, 40, 13) for _ in range(3))) == {2}


@needs_compiler
def test_a_named_backend_of_another_launcher_refuses_device_tensors():
    with volta_emulated() as launcher:
        assert registry.get(NAME).unsupported_reasons(SPEC) == ["device is cuda, these kernels run on cpu; move the tensors there"]
        assert launcher.unavailable_reasons() == []
    assert source_of(VARIANTS[0]) in sources() and cubins("sm_90")[0].arch == "sm_90"
