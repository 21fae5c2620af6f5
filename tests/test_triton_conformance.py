"""The conformance suite on triton-emulated: the kernels as they are, executed on the CPU by Triton's interpreter.

The interpreter must be on before triton is imported, and then nothing can be compiled; so this file runs itself in processes of its own
(test_in_the_interpreter). Quick: our own cases, an evenly spread sample of the reduced grid (SHARE) and some random calls.
HETERO_ATTN_FULL=1: the whole reduced grid, our own cases on planned tiles too, thousands of random calls, integer overflow checked.
"""

import ctypes
import mmap
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED:
    pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

from hetero_attn.ops import attention_varlen  # noqa: E402
from hetero_attn.profile import load_profile, shipped_profiles  # noqa: E402
from hetero_attn.testing.attention import check  # noqa: E402
from hetero_attn.testing.attention_cases import attention_cases, full_grid  # noqa: E402
from hetero_attn.testing.cases import AttentionCase  # noqa: E402
from hetero_attn.testing.test_attention_hypothesis import dense_cases, varlen_cases  # noqa: E402

if INTERPRETED:
    from hetero_attn_triton.tiling import Tile
    from triton_emulated import NAME, InterpretedLauncher, triton_emulated

FULL = full_grid()
SHARE = 33                                           # one case in so many of the reduced grid; the interpreter takes 0.4 s a case
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own: test_in_the_interpreter")
full = pytest.mark.skipif(not FULL, reason="HETERO_ATTN_FULL=1 runs it: half a second a call in the interpreter")
SUPPORTED = [case for case in attention_cases(full=False) if not case.gradients and case.dtype != torch.float64]
GRID = (SUPPORTED if FULL else SUPPORTED[:: SHARE]) if INTERPRETED else []


@pytest.fixture(scope="module", autouse=True)
def launcher():
    if not INTERPRETED:
        yield None
        return
    with triton_emulated() as launcher:
        yield launcher


def own_cases():
    """What the grid has too little of: several blocks and tiles, splits, folded heads, paddings, pages that fit blocks and not."""
    one = {"batch": 1, "q_heads": 2, "kv_heads": 1, "head_dim": 32, "dtype": torch.float16}
    long, several = one | {"q_len": 2, "kv_len": 260}, one | {"q_len": 40, "kv_len": 75}
    features = {"causal": {"is_causal": True}, "window": {"window_size": (40, 4)}, "bool": {"mask": "empty rows"},
                "bias": {"mask": "bias -inf"}, "min": {"mask": "bias min"}, "alibi": {"alibi": 2}, "sinks": {"sinks": torch.float32},
                "softcap": {"softcap": 3.0}, "nan": {"poison": "nan", "is_causal": True}, "inf": {"poison": "inf", "window_size": (20, 3)},
                "negative": {"scale": -0.4, "is_causal": True}}
    for name, options in features.items():
        yield AttentionCase(f"split-{name}", lse="always", **(long | options))
        yield AttentionCase(f"tiles-{name}", lse="always", **(several | options))
    everything = {"alibi": 2, "mask": "bias -inf", "sinks": torch.float32, "softcap": 3.0, "is_causal": True}
    yield AttentionCase("split-everything", lse="always", **long, **everything)
    for D, Dv in ((1, 5), (80, 80), (96, 17), (192, 128), (256, 256)):
        yield AttentionCase(f"head_dim-{D}-{Dv}", q_len=9, kv_len=40, is_causal=True,
                            **(one | {"head_dim": D, "v_head_dim": Dv, "dtype": torch.bfloat16}))
    yield AttentionCase("folded-8", q_len=3, kv_len=70, is_causal=True, lse="always", **(one | {"q_heads": 16, "kv_heads": 2, "batch": 2}))
    paged = one | {"head_dim": 64, "is_causal": True, "lse": "always"}
    for page_size in (1, 24, 32, 64):
        yield AttentionCase(f"pages-{page_size}", sequences=((1, 200), (33, 70), (0, 9), (2, 5)), page_size=page_size,
                            **(paged | ({"window_size": (100, -1)} if page_size == 24 else {})))
    yield AttentionCase("pages-nan", sequences=((3, 90), (2, 40)), page_size=32, poison="nan", **paged)
    yield AttentionCase("packed", sequences=((1, 200), (33, 70), (7, 0), (2, 5)), alibi=2, sinks=torch.float16, **paged)
    yield AttentionCase("single", q_len=35, kv_len=70, is_causal=True, lse="always", **(one | {"dtype": torch.float32}))
    yield AttentionCase("logits-of-1e4", contents="integers", scale=1.0, lse="always",
                        **(several | {"dtype": torch.float32, "is_causal": True}))


OWN = list(own_cases()) if INTERPRETED else []


@inside
@pytest.mark.parametrize("case", OWN, ids=lambda case: case.name)
def test_own_cases(case):
    check(case, NAME)


@inside
@pytest.mark.parametrize("case", GRID, ids=lambda case: case.name)
def test_conforms(case):
    check(case, NAME)


@inside
@full
@pytest.mark.parametrize("case", OWN, ids=lambda case: case.name)
def test_own_cases_on_the_planned_tiles(case):
    with triton_emulated(InterpretedLauncher(tiles={}), "triton-planned"):
        check(case, "triton-planned")


def fuzz(examples):
    return hypothesis.settings(max_examples=examples, deadline=None, derandomize=not FULL, database=None, print_blob=True,
                               suppress_health_check=list(hypothesis.HealthCheck))


@inside
@fuzz(2000 if FULL else 6)
@hypothesis.given(case=dense_cases())
def test_random_dense_calls(case):
    check(replace(case, gradients=()), NAME)


@inside
@fuzz(2000 if FULL else 6)
@hypothesis.given(case=varlen_cases())
def test_random_varlen_calls(case):
    check(replace(case, gradients=()), NAME)


@inside
@pytest.mark.parametrize("value", [float("nan"), 1.0])
def test_a_table_is_not_read_beyond_its_pages(value):
    """The table's last entry lies at the end of a page of memory, and the next may not be read: also not when a tile is done again for a
    value that is not finite, in blocks shorter than those that the range was rounded to."""
    libc = ctypes.CDLL(None, use_errno=True)
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address + mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    table = torch.frombuffer(memory, dtype=torch.int32, count=1, offset=mmap.PAGESIZE - 4).view(1, 1)
    table.zero_()
    k, v, q = (torch.randn(shape, dtype=torch.float16) for shape in ((1, 16, 1, 64), (1, 16, 1, 64), (3, 1, 64)))
    v[0, 9] = value                                  # the last key: only the last row sees it
    starts, lengths = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([10], dtype=torch.int32)
    tiles = type("Tall", (dict,), {"get": lambda self, name, default=None: Tile(16, 64, 4, 1)})()
    with triton_emulated(InterpretedLauncher(tiles=tiles), "triton-guarded"):
        out = attention_varlen(q, k, v, starts, None, 3, 10, block_table=table, seqused_k=lengths, is_causal=True, backend="triton-guarded")
    assert out.isnan().any(-1).flatten().tolist() == [False, False, value != value]


@inside
def test_splits_and_folded_heads_are_among_the_own_cases(launcher):
    seen = set()
    for case in OWN:
        if case.name in ("split-causal", "folded-8", "tiles-causal"):
            check(case, NAME)
            seen |= {(name, constants.get("SPLIT"), constants.get("HEADS")) for name, _, constants in launcher.launches}
    assert {("attention", True, 2), ("attention", False, 1)} <= seen and any(name == "combine" for name, _, _ in seen)
    assert any(heads == 8 for _, _, heads in seen)


PARTS = {"own": "test_own or test_splits", "grid": "test_conforms or random"}


@pytest.mark.skipif(INTERPRETED, reason="this is the process of its own")
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.timeout(10800 if FULL else 280)
def test_in_the_interpreter(part):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=0", __file__,
               "-k", PARTS[part]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="of the whole, not of the kernels")
def test_it_is_never_chosen_automatically():
    assert all("triton-emulated" not in load_profile(path).backends for path in shipped_profiles().values())
