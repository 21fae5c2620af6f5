"""The ascend backend without torch_npu: what it says of calls, versions and this machine, and the index arithmetic of its sparse modes."""

import importlib.metadata

import hypothesis
import pytest
import torch
from hetero_attn_ascend import AscendBackend, kernel_route, launcher, limits
from hetero_attn_ascend.sparse import ALL, BAND, CAUSAL, COMPRESSED, WHOLE, CompressedMask, full_mask, rows_without_keys, sparse_of
from hetero_attn_ascend.tiling import even_split

from hetero_attn import registry
from hetero_attn.explain import explain_spec
from hetero_attn.profile import load_profile
from hetero_attn.spec import AttentionSpec

st = hypothesis.strategies
BACKEND = AscendBackend()


def spec(**options) -> AttentionSpec:
    defaults = {"device": "npu", "dtype": torch.float16, "batch": 2, "q_heads": 8, "kv_heads": 2, "q_len": 128, "kv_len": 256,
                "head_dim": 128, "v_head_dim": 128, "scale": 0.1}
    return AttentionSpec(**(defaults | options))


VARLEN = {"varlen": True, "total_q": 256}
RUNS = {
    "dense": {}, "causal": {"is_causal": True}, "bf16": {"dtype": torch.bfloat16}, "window": {"window_size": (8, 0)},
    "decode": {"q_len": 1},
    "bool mask": {"mask": torch.bool}, "lse": {"return_lse": True}, "fp32": {"dtype": torch.float32}, "odd head": {"head_dim": 72},
    "wide": {"head_dim": 640, "v_head_dim": 640}, "Dv": {"v_head_dim": 64}, "packed": VARLEN, "pages": VARLEN | {"page_size": 128},
    "odd pages": VARLEN | {"page_size": 3}, "sinks": {"sinks": True}, "group of 70": {"q_heads": 140, "kv_heads": 2},
    # by our own kernel
    "softcap": {"softcap": 30.0}, "alibi": {"alibi": 1}, "float mask": {"mask": torch.float32}, "many heads": {"q_heads": 320},
}
OBJECTIONS = {
    "fp64": ({"dtype": torch.float64}, "dtype is float64, npu_fusion_attention has float32, float16 and bfloat16; cast to float32"),
    "gradients": ({"needs_grad": True}, "this backend serves inference"),
    "cpu": ({"device": "cpu"}, "device is cpu, torch_npu's operators run on npu"),
    "too wide": ({"head_dim": 800, "v_head_dim": 800}, "head_dim is 800, npu_fusion_attention takes up to 768"),
    "too wide for the kernel": ({"head_dim": 640, "v_head_dim": 640, "softcap": 1.0}, "the two-level kernel has up to 256"),
    "too long": ({"q_len": 21 << 20, "kv_len": 21 << 20, "head_dim": 512, "v_head_dim": 512},
                 f"the sequence is {21 << 20} long, npu_fusion_attention takes up to {1 << 20}"),
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_runs(options):
    assert BACKEND.unsupported_reasons(spec(**options)) == []


@pytest.mark.parametrize("options, words", OBJECTIONS.values(), ids=OBJECTIONS)
def test_objects(options, words):
    reasons = BACKEND.unsupported_reasons(spec(**options))
    assert any(words in reason for reason in reasons), reasons


def test_remarks_say_which_way_a_call_goes():
    remarks = lambda **options: " | ".join(BACKEND.remarks(spec(**options)))
    assert remarks() == ""
    assert "our own two-level kernel, which has run on no NPU: softcap is 30" in remarks(softcap=30.0)
    gathered = "gathered from their pages first: pages hold 3 tokens, the operator's decode takes multiples of 16 up to 512"
    assert gathered in remarks(**VARLEN, page_size=3, q_len=1)
    as_they_lie = remarks(**VARLEN, page_size=16, q_len=1)
    assert "gathered" not in as_they_lie and "lengths are read back" in as_they_lie
    assert "gathered from their pages first: several queries a sequence (up to 128)" in remarks(**VARLEN, page_size=128)
    assert "gathered from their pages first: window (8, 0) over 256 keys" in remarks(**VARLEN, page_size=128, q_len=1, window_size=(8, 0))
    assert "gathered" not in remarks(**VARLEN, page_size=128, q_len=1, window_size=(255, 0))
    assert "through npu_fusion_attention: dtype is float32" in remarks(dtype=torch.float32)
    assert "by its lse" in remarks(sinks=True)


def test_the_kernel_needs_triton_ascend_where_torch_npu_is(monkeypatch):
    installed = {"torch_npu": "2.13.0"}
    monkeypatch.setattr(kernel_route, "_version", lambda package: installed.get(package, ""))
    assert "triton-ascend is not installed; pip install triton-ascend==3.2.0" in AscendBackend().unsupported_reasons(spec(softcap=2.0))[-1]
    assert AscendBackend().unsupported_reasons(spec()) == []
    installed["triton-ascend"] = "3.1.0"
    assert "triton-ascend is 3.1.0, expected 3.2.0 or later" in AscendBackend().unsupported_reasons(spec(softcap=2.0))[-1]
    installed["triton-ascend"] = "3.1rc2"
    assert "triton-ascend is 3.1rc2, expected" in AscendBackend().unsupported_reasons(spec(softcap=2.0))[-1]
    installed["triton-ascend"] = "3.2rc1"
    assert AscendBackend().unsupported_reasons(spec(softcap=2.0)) == []
    installed["triton-ascend"] = "3.2.0"
    assert AscendBackend().unsupported_reasons(spec(softcap=2.0)) == []


def test_versions_pair_by_three_numbers(monkeypatch):
    found = {}

    def version(package):
        if package not in found:
            raise importlib.metadata.PackageNotFoundError(package)
        return found[package]

    monkeypatch.setattr(launcher.importlib.metadata, "version", version)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    assert "torch_npu is not installed; pip install torch-npu==2.13.0" in launcher.version_reasons()[0]
    for right in ("2.13.0", "2.13.0.post2"):
        found["torch_npu"] = right
        assert launcher.version_reasons() == []
    found["torch_npu"] = "2.12.0.post1"
    assert "torch_npu is 2.12.0.post1 beside torch 2.13.0+cpu, expected torch_npu 2.13.0" in launcher.version_reasons()[0]


def test_this_machine_is_told_what_is_missing():
    reasons = registry.get("ascend").unavailable_reasons()
    assert len(reasons) == 1 and "torch_npu" in reasons[0]
    explanation = explain_spec(spec(is_causal=True), load_profile("ascend910b"))
    assert explanation.chosen == "sdpa" and explanation.judgments[0].backend == "ascend"
    assert explanation.judgments[0].unsupported == () and explanation.judgments[0].unavailable == tuple(reasons)


def test_an_import_that_fails_is_a_reason(monkeypatch):
    def broken():
        raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")

    device = launcher.DeviceLauncher()
    monkeypatch.setattr(launcher, "version_reasons", list)
    monkeypatch.setattr(device, "load", broken)
    assert "libhccl.so" in device.reasons()[0] and "set_env.sh" in device.reasons()[0]


@pytest.mark.parametrize("name, words", [("Ascend910_93", "documented for Atlas A2"), ("Ascend910B", "documented for Atlas A2"),
                                          ("Ascend910B2", "")])
def test_a_chip_beyond_the_documents_is_refused(name, words, monkeypatch):
    """A3 has no profile here, and not all of the operators' documents name it."""
    device = launcher.DeviceLauncher()
    monkeypatch.setattr(launcher, "version_reasons", list)
    monkeypatch.setattr(device, "load", lambda: None)
    monkeypatch.setattr(device, "probe", lambda npu: [])
    npu = type("Npu", (), {"is_available": lambda: True, "get_device_name": lambda index: name})
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    reasons = device.reasons()
    assert not reasons if not words else name in reasons[0] and words in reasons[0]


@hypothesis.settings(max_examples=400, deadline=None, derandomize=True, database=None)
@hypothesis.given(q_len=st.integers(1, 12), kv_len=st.integers(0, 12), causal=st.booleans(), left=st.integers(-1, 14),
                  right=st.integers(-1, 14))
def test_sparse_modes_mean_what_the_call_means(q_len, kv_len, causal, left, right):
    """Rows left to the operator all see a key, the others none, and the mode's band is the call's, by the documentation's words."""
    call = spec(is_causal=causal, window_size=(left, right), q_len=q_len, kv_len=kv_len)
    i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)[None]
    position = i + kv_len - q_len
    seen = torch.ones(q_len, kv_len, dtype=torch.bool)
    seen = seen & (j <= position) if causal else seen
    seen = seen & (j >= position - left) if left >= 0 else seen
    seen = seen & (j <= position + right) if right >= 0 else seen
    first = rows_without_keys(call, q_len, kv_len)
    assert not seen[:first].any() and seen[first:].any(-1).all()
    if first == q_len:
        return
    rows = q_len - first
    mode, before, after = sparse_of(call, rows, kv_len)
    own = torch.arange(rows)[:, None] + kv_len - rows
    want = {WHOLE: torch.ones(rows, kv_len, dtype=torch.bool), CAUSAL: j <= own, BAND: (j - own <= after) & (own - j <= before)}[mode]
    assert torch.equal(want, seen[first:])
    assert mode == BAND or (before, after) == (ALL, ALL)


def test_masks_have_the_operators_polarity():
    mask = CompressedMask()
    one = mask.on(torch.device("cpu"))
    assert one.shape == (COMPRESSED, COMPRESSED) and not one[5, 5] and one[5, 6] and mask.on(torch.device("cpu")) is one
    attend = torch.rand(2, 1, 3, 4) < 0.5
    whole = full_mask(spec(is_causal=True, q_len=3, kv_len=4), attend, 3, 4)
    assert torch.equal(whole, ~(attend & torch.ones(3, 4, dtype=torch.bool).tril(1))) and whole.is_contiguous()


def test_limits_name_value_bound_and_remedy():
    assert limits.pages(spec(**VARLEN, page_size=24, q_len=1))[0] == (
        "pages hold 24 tokens, the operator's decode takes multiples of 16 up to 512; set kv_block_size: 128")
    assert limits.pages(spec(**VARLEN, page_size=64)) == [
        "several queries a sequence (up to 128), the operator reads pages as they lie at one"]
    assert "head_dim is 72, npu_fused_infer_attention_score takes multiples of 16 up to 512" in limits.infer(spec(head_dim=72))


LENGTHS = {                                 # the longest that each operator takes, and one more
    "one query": (limits.infer, {"q_len": 1}, "kv_len", 262144), "several queries": (limits.infer, {"q_len": 2}, "kv_len", 20971520),
    "many queries": (limits.infer, {}, "q_len", 20971520), "fusion, keys": (limits.fusion, {}, "kv_len", 1 << 20),
    "fusion, queries": (limits.fusion, {}, "q_len", 1 << 20), "fusion, packed": (limits.fusion, VARLEN, "kv_len", 1 << 20),
    "fusion, batch": (limits.fusion, {}, "batch", 2 << 20), "infer, batch": (limits.infer, {}, "batch", 65536),
}


@pytest.mark.parametrize("objections, options, name, longest", LENGTHS.values(), ids=LENGTHS)
def test_lengths_are_bounded(objections, options, name, longest):
    assert objections(spec(**options | {name: longest})) == []
    reasons = objections(spec(**options | {name: longest + 1}))
    assert len(reasons) == 1 and str(longest + 1) in reasons[0] and str(longest) in reasons[0]


def test_a_long_decode_goes_through_fusion_and_says_so():
    assert "through npu_fusion_attention: the sequence is 300000 long" in " | ".join(BACKEND.remarks(spec(q_len=1, kv_len=300000)))


def test_the_pool_is_judged_as_it_is():
    pages = torch.empty(3, 128, 2, 64, device="meta")
    assert limits.page_pool(pages, [128, 1, 128], 128) == []
    assert limits.page_pool(pages, [128, 129, 1], 128) == ["the sequences have 4 blocks, the pool 3, and the operator wants as many"]
    large = torch.empty(1 << 17, 128, 2, 64, device="meta")
    assert f"the pages hold {2**31} numbers, the operator takes up to {2**31 - 1}" in limits.page_pool(large, [5], 128)[0]


def test_every_task_goes_to_one_core():
    weights = [5, 1, 1, 1, 4, 0, 2]
    split = even_split(weights, 3)
    assert sorted(index for core in split for index in core) == list(range(7))
    assert max(sum(weights[index] for index in core) for core in split) == 5
    assert even_split([], 2) == [[], []]
