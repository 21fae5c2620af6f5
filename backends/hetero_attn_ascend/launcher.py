"""Where the operators come from, and why they may be missing: the NPU with its torch_npu, or the same torch_npu on CPU tensors under test.

torch_npu is imported on first use and never at module level: without CANN its import fails, and with CANN it takes seconds. It pairs with
one torch only, version by version, so both are compared before anything is loaded.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
from typing import Any

import torch

from hetero_attn.communicator import Communicator
from hetero_attn_ascend import kernel_route

# Atlas A2. Of A3 (Ascend910_93) the documents name npu_fused_infer_attention_score alone, and no profile here has its numbers.
SUPPORTED = r"Ascend910B[1-4]"
TINY = 16


class DeviceLauncher:
    """The real device."""

    device = "npu"

    def load(self) -> Any:
        """The torch_npu module. Raises whatever its import raises."""
        return importlib.import_module("torch_npu")

    def reasons(self) -> list[str]:
        """Why the operators do not run on this machine; [] = a tiny call worked."""
        reasons = version_reasons()
        if reasons:
            return reasons
        try:
            npu = self.load()
        except Exception as error:
            hint = "source CANN's set_env.sh first" if "cannot open shared object" in str(error) else "see `make npu-check`"
            return [f"torch_npu does not import: {str(error).splitlines()[0]}; {hint}"]
        if not torch.npu.is_available():
            return ["torch_npu sees no NPU; check `npu-smi info` and the driver"]
        name = torch.npu.get_device_name(0)
        if not re.match(SUPPORTED, name):
            return [f"the device is {name}, both fused operators are documented for Atlas A2 (Ascend910B1 to B4) alone"]
        return self.probe(npu)

    def kernel_reasons(self) -> list[str]:
        """Why our own kernel does not run on this machine's device."""
        return kernel_route.kernel_reasons()

    def make_kernel(self) -> Any:
        """The kernel, planned for the chip that is here."""
        return kernel_route.make_kernel()

    def group_name(self, base: Communicator) -> str:
        """HCCL's name of a new group over all ranks. All ranks call it together. Raises RuntimeError."""
        group = torch.distributed.new_group(backend="hccl")
        return group._get_backend(torch.device(self.device)).get_hccl_comm_name(base.rank)

    def probe(self, npu: Any) -> list[str]:
        """A tiny real call of each operator: ones in, ones out."""
        ones = torch.ones(1, 1, TINY, TINY, dtype=torch.float16, device=self.device)
        try:
            first, _ = npu.npu_fused_infer_attention_score(ones, ones, ones, num_heads=1, input_layout="BNSD", scale=1.0)
            second = npu.npu_fusion_attention(ones, ones, ones, 1, "BNSD", scale=1.0)[0]
            wrong = [name for name, out in (("npu_fused_infer_attention_score", first), ("npu_fusion_attention", second))
                     if not torch.equal(out.cpu(), torch.ones(ones.shape, dtype=ones.dtype))]
        except Exception as error:
            return [f"a tiny call of the fused operators failed: {str(error).splitlines()[0]}"]
        return [f"a tiny call of {name} gave wrong numbers" for name in wrong]


def version_reasons() -> list[str]:
    """What is wrong with torch_npu's presence or version, judged without importing it.

    The rule: torch_npu A.B.C (further parts and postN are its own) is built against torch A.B.C and loads beside that one only.
    """
    try:
        found = importlib.metadata.version("torch_npu")
    except importlib.metadata.PackageNotFoundError:
        return [f"torch_npu is not installed; pip install torch-npu=={_release(torch.__version__)} (its first three numbers are torch's)"]
    if _release(found) != _release(torch.__version__):
        return [f"torch_npu is {found} beside torch {torch.__version__}, expected torch_npu {_release(torch.__version__)}: its first three "
                f"numbers are those of the torch it is built against; pip install torch-npu=={_release(torch.__version__)}, or "
                f"torch=={_release(found)}"]
    return []


def _release(version: str) -> str:
    """'2.13.0' of '2.13.0.post2' or '2.13.0+cpu'."""
    found = re.match(r"\d+\.\d+\.\d+", version)
    return found[0] if found else version


def autoload_note() -> list[str]:
    """What `doctor` should say of torch's habit of importing torch_npu by itself."""
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "0":
        return ["torch imports an installed torch_npu by itself; where CANN is missing that breaks `import torch`: "
                "TORCH_DEVICE_BACKEND_AUTOLOAD=0 prevents it"]
    return []
