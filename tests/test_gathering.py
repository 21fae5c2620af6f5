"""What attention gathers beside the pages is counted where layers are placed: by the backend, by a rank that runs, and by a plan."""

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hetero_attn_ascend import AscendBackend
from hetero_attn_sdpa import SdpaBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hetero_attn.backend import Backend
from hetero_attn.models.gathering import calls, copies_planned
from hetero_attn.models.hosts import Host, Hosts
from hetero_attn.models.planning import plan_model
from hetero_attn.parallel.placement import DeviceMemoryError, most_layer_bytes, place
from hetero_attn.profile import load_profile
from hetero_attn.spec import AttentionSpec, Operands

PANGU = Path(__file__).parents[1] / "examples" / "shapes" / "pangu-38b"
PAGED = AttentionSpec("cuda", torch.float16, 1, 4, 4, 16, 4096, 64, 64, is_causal=True, scale=0.1, varlen=True, total_q=16, page_size=64)
DECODE = replace(PAGED, q_len=1, total_q=1)


class Live(TorchDispatchMode):
    """Bytes of the storages that come and go inside: what they are at most together."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (each.untyped_storage() for each in tree_leaves(out) if isinstance(each, torch.Tensor)):
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, storage: int, nbytes: int) -> None:
        self.known.discard(storage)
        self.now -= nbytes


@pytest.mark.parametrize("device, spec", [
    ("cpu", DECODE), ("cpu", replace(DECODE, softcap=5.0)), ("cpu", PAGED), ("cpu", replace(PAGED, softcap=5.0)),
    ("meta", replace(DECODE, softcap=5.0)), ("meta", replace(PAGED, softcap=5.0)),         # as on a device: NaN is zeroed without a look
], ids=["decode", "decode-capped", "prefill", "prefill-capped", "device-decode-capped", "device-prefill-capped"])
def test_sdpa_gathers_what_it_says(device, spec):
    """The bytes that live at once in a real call, in copies of its K and V; scores and masks are the rest. (On "meta" torch's fused kernels
    are spelled out in other operations, so that only the composed route is the device's there.)"""
    spec = replace(spec, device="cpu" if device == "cpu" else "cuda")
    pages = spec.kv_len // spec.page_size
    k, v = (torch.zeros(pages, spec.page_size, spec.kv_heads, 64, dtype=spec.dtype, device=device) for _ in "kv")
    q = torch.zeros(spec.q_len, spec.q_heads, 64, dtype=spec.dtype, device=device)
    operands = Operands(cu_seqlens_q=torch.tensor([0, spec.q_len], dtype=torch.int32), seqused_k=torch.tensor([spec.kv_len]),
                        block_table=torch.arange(pages, dtype=torch.int32)[None])
    with Live() as live, torch.no_grad():
        SdpaBackend().attention(q, k, v, spec, operands)
    copies = live.peak / (k.nbytes + v.nbytes)
    said = SdpaBackend().gathered_copies(spec)
    assert said <= copies < said + 0.35, (copies, said)


def test_who_gathers():
    assert Backend().gathered_copies(PAGED) == 0
    sdpa, ascend = SdpaBackend(), AscendBackend()
    assert [sdpa.gathered_copies(each) for each in (DECODE, PAGED, replace(PAGED, page_size=0))] == [1, 2, 0]
    on_npu = replace(PAGED, device="npu", page_size=128)
    assert [ascend.gathered_copies(each) for each in (replace(on_npu, q_len=1, total_q=1), on_npu)] == [0, 2]


def test_a_place_is_left_for_what_is_gathered():
    assert len(place(8, 10, 80).host) == 0 and len(place(8, 10, 80, copies=1).host) == 3         # 5 + 2 buffers + 1
    assert place(8, 10, 80, copies=1).device_bytes == 80 and place(8, 10, 90, copies=1).device_bytes == 90
    words = r"at least 100 B of the device \(2 times a layer's KV gathered by attention among them\) with placement all-device, 99 B are"
    with pytest.raises(DeviceMemoryError, match=words):
        place(8, 10, 99, "all-device", copies=2)
    for copies in (0, 1, 3):
        most = most_layer_bytes(8, 80, copies=copies)
        place(8, most, 80, copies=copies)
        with pytest.raises(DeviceMemoryError):
            place(8, most + 1, 80, copies=copies)


def test_a_plan_asks_the_backend_that_the_profile_would_take():
    """float16 on a V100: our kernels, which read pages. bfloat16, or by torch's SDPA: two copies while a prompt runs, so fewer layers."""
    ours, bf16, torchs = (load_profile("v100", sets=sets) for sets in ([], ["dtype=bfloat16"], ["backends=[sdpa]"]))
    plans = [plan_model(PANGU, Hosts((Host(profile, "cuda"),) * 8), context=262144) for profile in (ours, bf16, torchs)]
    first = [plan.ranks[0].placement for plan in plans]
    assert [each.copies for each in first] == [0, 2, 2] and [len(each.device) for each in first] == [18, 16, 16]
    assert all(rank.total <= rank.memory for plan in plans for rank in plan.ranks)
    assert plans[2].cooperation.largest_on_devices < plans[0].cooperation.largest_on_devices
    absent = replace(ours, backends=("nobody", "sdpa"))
    rank = plans[0].ranks[0]
    assert copies_planned(_config(), rank.partition, torch.float16, absent) == 2


def _config():
    from hetero_attn.models.config_only import open_sizes

    return open_sizes(PANGU)[0]


def test_a_running_rank_asks_the_backend_that_serves_it():
    pytest.importorskip("transformers", reason="transformers writes the checkpoints these tests read")
    from schedule_models import family_decoder

    from hetero_attn.communicator import SoloCommunicator
    from hetero_attn.models.placing import layer_bytes, make_placing, weight_bytes
    from hetero_attn.registry import use_backend

    decoder = family_decoder("gemma2", SoloCommunicator())
    windows = {spec.window_size for spec in calls(decoder.config, decoder.partition, decoder.dtype, "cpu", decoder.profile, 16)}
    assert len(windows) == 2                                             # Gemma 2 has two kinds of layer
    layers, blocks = decoder.config.layers, 50
    figures = make_placing(decoder, decoder.profile, 1, None).figures(decoder, 1)
    limit = weight_bytes(decoder) + figures.activations + layers * layer_bytes(decoder, blocks)
    for name, copies in (("reference", 0), ("sdpa", 1)):                 # fp32 has nothing to widen
        with use_backend(name):
            placing = make_placing(decoder, decoder.profile, "auto", limit)
            placed = placing.place(decoder, blocks, 1)
        assert placing.copies == placed.copies == copies and bool(placed.host) == bool(copies)
        assert figures.weights + figures.activations + placed.device_bytes <= limit
        most = placing.tokens(1)[0] // decoder.kv_block_size
        assert placing.place(decoder, most, 1)
