"""The Hopper kernels compiled for the device, without one: NVRTC 12.9 makes the cubins, the machine code is held to what it must contain.

Opcodes are the lowest 12 bits of an instruction. The multimem instructions' were read off nvdisasm's text, which is compared where one is
installed.
"""

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hetero_attn_hopper.abi import KINDS
from hetero_attn_hopper.kernels import MULTIMEM, NAMES, UNICAST, cubins, source_of
from sass import LOAD_LOCAL, STORE_LOCAL, nvdisasm, opcodes

from hetero_attn.cubin import Cubin, nvrtc_reason

pytestmark = pytest.mark.skipif(nvrtc_reason() is not None, reason=nvrtc_reason() or "")
ARCHES = ("sm_90", "sm_80", "sm_70")
EVERYTHING = [cubin for arch in ARCHES for cubin in cubins(arch)]
REDUCES = {torch.bfloat16: r"LDGMC\.E\.F32ADD\.BF16x8\.RN\.STRONG\.SYS", torch.float16: r"LDGMC\.E\.F32ADD\.F16x8\.RN\.STRONG\.SYS",
           torch.float32: r"LDGMC\.E\.ADD\.F32x4\.RN\.STRONG\.SYS"}
LOAD_MULTICAST = 0x9A5


@pytest.fixture(scope="module", autouse=True)
def everything():
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(Cubin.build, EVERYTHING))


@pytest.mark.parametrize("cubin", EVERYTHING, ids=lambda cubin: cubin.name)
def test_no_kernel_spills(cubin):
    """1024 threads of a block leave a thread 64 registers; indices that are not constant would go to local memory."""
    facts = cubin.facts()
    assert (facts["spill_bytes"], facts["stack_bytes"]) == (0, 0) and facts["registers"] <= 64
    for code in opcodes(cubin.build().read_bytes()).values():
        assert not code.count(LOAD_LOCAL) and not code.count(STORE_LOCAL)


@pytest.mark.parametrize("dtype", KINDS, ids=NAMES.get)
def test_the_switch_sums_by_one_door_alone(dtype):
    """Every kernel that sums in place, and only with multimem; one instruction for 8 halves, two for 8 fp32."""
    for operation in ("all_reduce_rms_norm", "all_reduce", "reduce_scatter"):
        counts = {}
        for door in (MULTIMEM, UNICAST):
            code = opcodes(source_of(operation, dtype, door).cubin("sm_90").build().read_bytes())[f"hopper_{operation}"]
            counts[door] = code.count(LOAD_MULTICAST)
        assert counts[UNICAST] == 0 and counts[MULTIMEM] >= (2 if dtype == torch.float32 else 1), (operation, counts)


@pytest.mark.skipif(nvdisasm() is None, reason="no nvdisasm: pip install triton==3.6.0 carries one")
@pytest.mark.parametrize("dtype", KINDS, ids=NAMES.get)
def test_what_a_disassembler_says(dtype):
    """The reduction in fp32, data at system scope, flags that release (a fence before the store) and acquire."""
    path = source_of("all_reduce_rms_norm", dtype, MULTIMEM).cubin("sm_90").build()
    text = subprocess.run([nvdisasm(), str(path)], capture_output=True, text=True, check=True).stdout
    code = opcodes(path.read_bytes())["hopper_all_reduce_rms_norm"]
    assert len(re.findall(rf"\b{REDUCES[dtype]}\b", text)) == code.count(LOAD_MULTICAST) >= 1
    assert re.search(r"\bSTG\.E\.128\.STRONG\.SYS\b", text) and re.search(r"\bSTG\.E\.64\.STRONG\.SYS\b", text)
    assert len(re.findall(r"\bMEMBAR\.ALL\.SYS\b", text)) >= 2 and re.search(r"\bCCTL\.IVALL\b", text)
    assert not re.search(r"\b(LDL|STL)\b", text)
