"""Every Volta kernel compiled for the device, without one: NVRTC 12.9 makes the cubins, ptxas and the machine code are held to the plan.

For sm_90 too, where m8n8k4 is lowered to other instructions: the same source may then be run for its results on a newer GPU.
"""

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import pytest
from hetero_attn_volta.kernels import COMBINE, cubins, source_of
from hetero_attn_volta.tiling import VARIANTS, occupancy
from sass import HMMA_884, LOAD_GLOBAL, LOAD_LOCAL, STORE_LOCAL, STORE_SHARED, nvdisasm, opcodes

from hetero_attn.cubin import Cubin, facts_of, find_nvrtc, nvrtc_reason
from hetero_attn.jit import BuildError
from hetero_attn.profile import load_profile
from hetero_attn.testing.attention_cases import full_grid

pytestmark = pytest.mark.skipif(nvrtc_reason() is not None, reason=nvrtc_reason() or "")
V100 = load_profile("v100").hardware
IDS = lambda value: getattr(value, "name", value)
# For sm_90 the usual head dimensions, and all of them in the full run: ptxas takes half a minute for everything.
HOPPER = [kernel for kernel in cubins("sm_90") if full_grid() or any(part in kernel.name for part in ("-d64-", "-d128-", "combine"))]


@pytest.fixture(scope="module", autouse=True)
def everything():
    """All cubins of both architectures, compiled side by side (those that are in the cache are not compiled again)."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(Cubin.build, [*cubins("sm_70"), *HOPPER]))


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_a_variant_uses_tensor_cores_and_spills_nothing(variant):
    cubin = source_of(variant).cubin("sm_70")
    facts, code = cubin.facts(), opcodes(cubin.build().read_bytes())[f"volta_{variant.kernel}"]
    assert code.count(HMMA_884) >= 4 * 2 * variant.row_tiles * (variant.keys // 16) * (variant.head_dim // 4)      # four steps an mma
    assert (facts["spill_bytes"], facts["stack_bytes"], facts["static_shared_bytes"]) == (0, 0, 0)
    assert not code.count(LOAD_LOCAL) and not code.count(STORE_LOCAL)
    assert 32 <= facts["registers"] <= variant.register_bound
    assert occupancy(variant, V100, facts["registers"]) >= variant.blocks
    assert variant.shared_bytes <= V100.shared_memory_bytes


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_loads_go_out_before_the_products_that_hide_them(variant):
    """In the machine code as in the source: between the stores of a tile and each of the two products, the next tile's loads are issued."""
    code = opcodes(source_of(variant).cubin("sm_70").build().read_bytes())[f"volta_{variant.kernel}"]
    steps = [name for code_ in code for name in [{HMMA_884: "product", LOAD_GLOBAL: "load", STORE_SHARED: "store"}.get(code_)] if name]
    runs = [(name, len(list(group))) for name, group in groupby(steps)]
    products = [i for i, (name, count) in enumerate(runs) if name == "product"]
    threads = variant.threads if variant.kernel == "forward" else 32
    pieces = variant.keys * variant.head_dim // variant.parts // 8 // threads
    assert [runs[i][1] for i in products] == [4 * variant.row_tiles * (variant.keys // 16) * (variant.head_dim // 4)] * 2
    for i in products:
        assert runs[i - 1][0] == "load" and runs[i - 1][1] >= pieces


@pytest.mark.parametrize("kernel", HOPPER, ids=IDS)
def test_the_same_source_compiles_for_hopper(kernel):
    """There one m8n8k4 becomes shuffles and other products, which want registers of their own: a few bytes may spill, no more."""
    facts, code = kernel.facts(), opcodes(kernel.build().read_bytes())
    assert facts["compiler"].startswith("NVRTC 12.") and facts["registers"] <= 255 and facts["spill_bytes"] <= 1024
    assert len(code) == 1 and HMMA_884 not in next(iter(code.values()))


def test_the_combining_kernel():
    cubin = COMBINE.cubin("sm_70")
    assert cubin.facts()["spill_bytes"] == 0 and HMMA_884 not in opcodes(cubin.build().read_bytes())["volta_combine"]


@pytest.mark.skipif(nvdisasm() is None, reason="no nvdisasm: pip install triton==3.6.0 carries one that reads sm_70")
def test_opcodes_are_what_a_disassembler_says():
    path = source_of(VARIANTS[0]).cubin("sm_70").build()
    text = subprocess.run([nvdisasm(), str(path)], capture_output=True, text=True, check=True).stdout
    assert len(re.findall(r"\bHMMA\.884\.F32\.F32\.STEP[0-3]\b", text)) == opcodes(path.read_bytes())["volta_forward"].count(HMMA_884)
    assert not re.search(r"\b(LDL|STL)\b", text)


def test_a_spill_is_seen(tmp_path):
    """The control: too many live values for the registers that are allowed, and both reports say so."""
    body = " ".join(f"float x{i} = in[{i} * n] * k;" for i in range(90)) + " __syncthreads(); out[0] = " + \
        " + ".join(f"x{i} * in[x{i} > 0 ? {i} : n]" for i in range(90)) + ";"
    (tmp_path / "spill.cu").write_text(
        f'extern "C" __global__ void __launch_bounds__(1024, 2) spill(float* out, const volatile float* in, int n, float k) {{ {body} }}')
    cubin = Cubin("spill", "spill.cu", root=tmp_path)
    code = opcodes(cubin.build(into=tmp_path / "made").read_bytes())["spill"]
    assert code.count(LOAD_LOCAL) and code.count(STORE_LOCAL)
    again = Cubin("spill", "spill.cu", root=tmp_path)
    again.build()
    assert again.facts()["spill_bytes"] > 0 and again.facts()["registers"] <= 32


def test_what_ptxas_says_is_read():
    log = ("ptxas info    : 0 bytes gmem\nptxas .     8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads\n"
           "ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem, 752 bytes cmem[0]\n")
    assert facts_of(log) == {"registers": 40, "spill_bytes": 16, "stack_bytes": 8, "static_shared_bytes": 128}


def test_a_broken_source_shows_nvrtcs_words(tmp_path):
    (tmp_path / "broken.cu").write_text("extern \"C\" __global__ void broken() { nonsense; }")
    words = r"(?s)kernel broken-sm_70: NVRTC 12\.\d+: NVRTC_ERROR_COMPILATION.*identifier \"nonsense\" is undefined"
    with pytest.raises(BuildError, match=words):
        Cubin("broken", "broken.cu", root=tmp_path).build(into=tmp_path / "made")
    assert not list((tmp_path / "made").rglob("*.cubin"))
    with pytest.raises(BuildError, match=r"source .*missing\.cu: No such file"):
        Cubin("missing", "missing.cu", root=tmp_path).build(into=tmp_path / "made")


def test_a_cubin_is_keyed_by_all_it_is_made_from(tmp_path):
    (tmp_path / "answer.cuh").write_text("#define ANSWER 42\n")
    (tmp_path / "tiny.cu").write_text('#include "answer.cuh"\nextern "C" __global__ void tiny(int* out) { *out = ANSWER + MORE; }\n')
    tiny = lambda more=1, arch="sm_70": Cubin("tiny", "tiny.cu", (("MORE", more),), arch=arch, root=tmp_path)
    digests = {tiny().digest, tiny(2).digest, tiny(arch="sm_90").digest}
    path = tiny().build(into=tmp_path / "made")
    assert tiny().find(tmp_path / "made") == path and tiny(2).find(tmp_path / "made") is None
    (tmp_path / "answer.cuh").write_text("#define ANSWER 43\n")
    assert tiny().digest not in digests and len(digests) == 3 and tiny().find(tmp_path / "made") is None


def test_without_nvrtc_there_is_a_remedy(monkeypatch, tmp_path):
    (tmp_path / "tiny.cu").write_text('extern "C" __global__ void tiny() {}')
    monkeypatch.setattr("hetero_attn.cubin.find_nvrtc", lambda: "NVRTC 12 is not installed; pip install it")
    with pytest.raises(BuildError, match="kernel tiny-sm_70 cannot be built: NVRTC 12 is not installed; pip install it"):
        Cubin("tiny", "tiny.cu", root=tmp_path).build(into=tmp_path / "made")
    assert find_nvrtc().version >= (12, 0)
