"""The two-level kernel lowers to Linalg with the real triton-ascend 3.2.0, without CANN: every variant that a call can ask for.

Beyond Linalg lies bishengir, which comes with CANN and is absent; what it makes of the kernel is for `make npu-check` to say.
"""

import os
import subprocess
from itertools import product

import pytest

os.environ.setdefault("TRITON_ASCEND_ARCH", "Ascend910B3")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET compiles nothing: `make test-ascend` runs this file in a process of its own", allow_module_level=True)
triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.backends.ascend.compiler", reason="this triton is not triton-ascend: `make test-ascend` has it")

import triton.language as tl  # noqa: E402
from hetero_attn_ascend.chip import Chip  # noqa: E402
from hetero_attn_ascend.kernel_tiling import compiler_options  # noqa: E402
from hetero_attn_ascend.planner import kernel_tiles  # noqa: E402
from hetero_attn_ascend.tiling import Problem  # noqa: E402
from hetero_attn_ascend.two_level_kernel import two_level_attention  # noqa: E402

from hetero_attn.profile import load_profile  # noqa: E402

POINTERS = {"Q": None, "K": None, "V": None, "OUT": None, "LSE": "*fp32", "SLOPES": "*fp32", "SINKS": "*fp32", "MASK": None,
            "TILING": "*i8", "TABLE": "*i32", "TASKS": "*i32", "CORE_STARTS": "*i32", "Q_BASES": "*i64", "K_BASES": "*i64",
            "V_BASES": "*i64", "O_BASES": "*i64", "LSE_BASES": "*i64", "Q_LENS": "*i32", "KV_LENS": "*i32"}
FLAGS = ("HAS_LEFT", "HAS_RIGHT", "HAS_SOFTCAP", "HAS_ALIBI", "HAS_SINKS", "PAGED")


def lowered(constants: dict, dtype: str, mask: str = "*i8", kernel=two_level_attention) -> str:
    """The kernel as Linalg, in MLIR's text."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        kind = POINTERS.get(name, "i32")
        signature[name] = (mask if name == "MASK" else f"*{dtype}") if kind is None else kind
    signature |= {name: "fp32" for name in ("scale", "softcap") if name in signature}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constants=constants)
    target = compiler.GPUTarget("npu", os.environ["TRITON_ASCEND_ARCH"], 0)
    backend = triton.compiler.make_backend(target)
    options = backend.parse_options({})
    context = compiler.ir.context()
    compiler.ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    stages: dict = {}
    backend.add_stages(stages, options)
    metadata = {"hash": "test", **options.__dict__, "target": target}
    for stage in ("ttir", "ttadapter"):
        module = stages[stage](module, metadata)
    return str(module)


def constants(**changes) -> dict:
    return {name: False for name in FLAGS} | {"MASK_KIND": 0, "UPCAST": False, "BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_D": 128,
                                              "BLOCK_V": 128} | changes


VARIANTS = {
    "plain": {}, "causal": {"HAS_RIGHT": True}, "window": {"HAS_LEFT": True, "HAS_RIGHT": True}, "softcap": {"HAS_SOFTCAP": True},
    "alibi": {"HAS_ALIBI": True, "HAS_RIGHT": True}, "sinks": {"HAS_SINKS": True}, "pages": {"PAGED": True}, "bool": {"MASK_KIND": 1},
    "bias": {"MASK_KIND": 2}, "everything": {flag: True for flag in FLAGS} | {"MASK_KIND": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_feature_lowers(variant):
    text = lowered(constants(**VARIANTS[variant]), "fp16", mask="*fp32" if VARIANTS[variant].get("MASK_KIND") == 2 else "*i8")
    assert "func.func @two_level_attention" in text and text.count("linalg.matmul") >= 2, text[:400]
    assert "tt.dot" not in text and "tt.load" not in text


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_dtype_lowers(dtype):
    assert "linalg.matmul" in lowered(constants(HAS_RIGHT=True), dtype)


@pytest.mark.parametrize("flags", list(product((False, True), repeat=len(FLAGS))), ids=str)
def test_every_combination_lowers(flags):
    assert "linalg.matmul" in lowered(constants(**dict(zip(FLAGS, flags))), "fp16")


CHIP = Chip.of(load_profile("ascend910b"))
CALLS = {"D 128": (4096, 128, 2), "D 64": (4096, 64, 2), "D 256": (4096, 256, 2), "fp32": (4096, 128, 4), "short": (100, 128, 2)}


@pytest.mark.parametrize("length, head_dim, element", CALLS.values(), ids=CALLS)
def test_blocks_of_the_plan_lower(length, head_dim, element):
    """The kernel at the level-1 blocks that it is launched with."""
    plan = kernel_tiles(CHIP, Problem(1, 8, 32, length, length, head_dim, head_dim, element, -1, 0, False))
    text = lowered(constants(HAS_RIGHT=True, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_D=plan.padded_k, BLOCK_V=plan.padded_v),
                   {2: "fp16", 4: "fp32"}[element])
    assert f"tensor<{plan.block_m}x{plan.block_n}xf32>" in text and text.count("linalg.matmul") >= 2


def test_level_2_reaches_the_compiler(tmp_path, monkeypatch):
    """triton-ascend's own options take the plan's numbers, and its last stage hands them to bishengir, which a script stands for here."""
    plan = kernel_tiles(CHIP, Problem(1, 32, 32, 4096, 4096, 128, 128, 2, -1, 0, False))
    backend = triton.compiler.make_backend(compiler.GPUTarget("npu", os.environ["TRITON_ASCEND_ARCH"], 0))
    options = backend.parse_options(compiler_options(plan))
    assert {name: getattr(options, name) for name in compiler_options(plan)} == compiler_options(plan)
    told = tmp_path / "told"
    script = tmp_path / "bishengir-compile"
    script.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {told}\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setattr(compiler, "_get_npucompiler_path", lambda: str(script))
    monkeypatch.setattr(compiler, "NPUUtils", lambda: type("Utils", (), {"get_arch": lambda self: "Ascend910B3"})(), raising=False)
    metadata = {"hash": "test", **options.__dict__}
    text = lowered(constants(HAS_RIGHT=True, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n), "fp16")
    with pytest.raises(subprocess.CalledProcessError):
        compiler.linalg_to_bin_enable_npu_compile_A2_A3(text, metadata, options)
    said = told.read_text().split()
    for wanted in ("--tile-mix-cube-loop=4", "--tile-mix-vector-loop=4", "--set-workspace-multibuffer=2",
                   "--limit-auto-multi-buffer-only-for-local-buffer=False"):
        assert wanted in said, said


@triton.jit
def _shapes_that_do_not_meet(Q, OUT, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    q = tl.load(Q + tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :])
    tl.store(OUT + tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], tl.dot(q, q))


def test_a_kernel_that_cannot_lower_is_noticed():
    """A product of 64 x 128 with itself."""
    with pytest.raises(triton.CompilationError):
        lowered({"BLOCK_M": 64, "BLOCK_N": 128}, "fp16", kernel=_shapes_that_do_not_meet)
    assert "linalg.matmul" in lowered({"BLOCK_M": 64, "BLOCK_N": 64}, "fp16", kernel=_shapes_that_do_not_meet)
