"""The ascend backend against the real torch_npu: its schemas take every call, its meta kernels agree, CPU references of its operators run
them, and the result passes the conformance suite as `ascend-emulated`. Seeded faults in the translation are each caught.

Runs in an environment that has torch_npu (`make test-ascend`); elsewhere it is skipped. No NPU is involved: what holds here is that our
calls mean what the operators' documentation says, not that a device does what its documentation says.
"""

from collections import Counter
from contextlib import contextmanager

import hypothesis
import pytest
import torch
from ascend_stand_in import load_torch_npu, missing

if missing():
    pytest.skip(missing(), allow_module_level=True)

import ascend_operators
from ascend_operators import Refused, altered
from hetero_attn_ascend import AscendBackend, limits
from hetero_attn_ascend.launcher import DeviceLauncher, version_reasons
from hetero_attn_ascend.lengths import on_host

from hetero_attn import attention_varlen, registry
from hetero_attn.backend import UnsupportedError
from hetero_attn.testing.attention import broken_promises, check
from hetero_attn.testing.attention_cases import attention_cases, full_grid
from hetero_attn.testing.cases import AttentionCase
from hetero_attn.testing.test_attention_hypothesis import dense_cases, varlen_cases

NAME = "ascend-emulated"


class EmulatedLauncher(DeviceLauncher):
    """The real torch_npu on CPU tensors, by references under its schemas."""

    device = "cpu"

    def __init__(self, npu=None):
        self._npu = npu

    def load(self):
        torch_npu = load_torch_npu()
        ascend_operators.register()
        return self._npu or torch_npu

    def kernel_reasons(self):
        return ["our own kernel is tested in a process of its own (test_ascend_kernel.py)"]

    def reasons(self):
        if self._npu is not None:                                   # a seeded fault is for the calls to show, not for the probe
            return []
        return version_reasons() or self.probe(self.load())


@contextmanager
def emulated(name=NAME, npu=None):
    with registry.register(name, lambda: AscendBackend(EmulatedLauncher(npu))):
        yield name


@pytest.fixture(scope="module", autouse=True)
def backend():
    with emulated() as name:
        assert registry.get(name).unavailable_reasons() == []
        yield name


@pytest.mark.parametrize("case", attention_cases(), ids=lambda case: case.name)
def test_conformance(case):
    try:
        check(case, NAME)
    except UnsupportedError as objection:
        pytest.skip("; ".join(objection.reasons[NAME]))


def fuzz(examples):
    return hypothesis.settings(max_examples=examples, deadline=None, derandomize=not full_grid(), database=None, print_blob=True,
                               suppress_health_check=list(hypothesis.HealthCheck))


@fuzz(3000 if full_grid() else 60)
@hypothesis.given(case=dense_cases())
def test_random_dense_calls(case):
    _check_if_it_runs(case)


@fuzz(3000 if full_grid() else 60)
@hypothesis.given(case=varlen_cases())
def test_random_varlen_calls(case):
    _check_if_it_runs(case)


def _check_if_it_runs(case):
    try:
        check(case, NAME)
    except UnsupportedError:
        hypothesis.event("the backend objects")


HALF = {"dtype": torch.float16}
OWN_CASES = [
    AttentionCase("pages-as-they-lie", sequences=((1, 300), (1, 17), (1, 128)), page_size=128, **HALF),
    AttentionCase("pages-window", sequences=((1, 300), (1, 17), (1, 128)), page_size=16, window_size=(40, 0), is_causal=True, lse="always",
                  **HALF),
    AttentionCase("pages-garbage", sequences=((1, 300), (1, 17)), page_size=64, poison="nan", sinks=torch.float32, **HALF),
    AttentionCase("long-band", batch=1, q_len=60, kv_len=2300, head_dim=16, q_heads=1,
                  kv_heads=1, is_causal=True, window_size=(700, -1), **HALF),
    AttentionCase("mask-per-head", mask="empty rows", mask_axes="1hqk", lse="always", **HALF),
    AttentionCase("many-heads", q_heads=64, kv_heads=1, q_len=3, kv_len=9, **HALF),
    AttentionCase("group-of-70", q_heads=70, kv_heads=1, q_len=3, kv_len=9, is_causal=True, **HALF),
    AttentionCase("packed-decode-window-nan", sequences=((1, 60), (1, 17)), window_size=(3, -1), poison="nan", **HALF),
    AttentionCase("packed-decode-window-inf-fp32", sequences=((1, 60), (1, 17), (1, 70)), window_size=(40, 0), poison="inf", lse="always"),
    AttentionCase("pages-decode-window-nan", sequences=((1, 60), (1, 17), (1, 2)), page_size=16, window_size=(3, -1), poison="nan",
                  lse="always", **HALF),
    AttentionCase("odd-pages-decode-window-inf", sequences=((1, 60), (1, 17)), page_size=7, window_size=(3, 0), poison="inf", **HALF),
    AttentionCase("pages-prefill-window-nan", sequences=((3, 60), (1, 17), (9, 40)), page_size=16, window_size=(3, 0), poison="nan",
                  **HALF),
    AttentionCase("dense-decode-window-nan", q_len=1, kv_len=60, window_size=(3, -1), poison="nan", **HALF),
    AttentionCase("no-batch-padding", batch=0, q_len=3, kv_len=4, mask="padding", mask_axes="qk", **HALF),
    AttentionCase("mixed", sequences=((1, 40), (7, 7), (0, 5), (30, 9), (5, 0)), is_causal=True, window_size=(12, -1), lse="always"),
]


@pytest.mark.parametrize("case", OWN_CASES, ids=lambda case: case.name)
def test_own_cases(case):
    check(case, NAME)


def test_every_way_to_call_an_operator_was_taken():
    """After the grid above: each layout and sparse mode that the translation can choose has been run at least once."""
    for case in OWN_CASES:
        check(case, NAME)
    for options in ({"layout": "bshd", "is_causal": True}, {"layout": "bshd", "is_causal": True, "dtype": torch.float32},
                    {"mask": "random", "mask_axes": "11qk"}, {"window_size": (3, 5)}, {"window_size": (3, 5), "dtype": torch.float32},
                    {"sequences": ((5, 9), (7, 7)), "window_size": (2, 1)}, {"is_causal": True}, {}):
        check(AttentionCase("way", **(HALF | options)), NAME)
    taken = {(operator, layout, mode) for operator, layout, mode, *_ in (key for key in ascend_operators.calls if len(key) == 5)}
    wanted = {("infer", "BNSD", mode) for mode in (0, 1, 3, 4)} | {("infer", "BSND", 3), ("fusion", "BSND", 3)}
    wanted |= {("fusion", "BNSD", mode) for mode in (1, 4)} | {("fusion", "TND", mode) for mode in (3, 4)}
    assert wanted <= taken, wanted - taken
    assert any(key[0] == "infer" and key[3] for key in ascend_operators.calls)                      # pages as they lie


def test_what_lies_outside_the_window_of_a_decode_changes_no_bit():
    """A key's NaN and a value's Inf far before the window, packed and in pages: the same bits as with numbers there."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 2, 64, generator=generator).half() for n in (1, 60, 60))
    bad_k, bad_v = k.clone(), v.clone()
    bad_k[5], bad_v[7] = float("nan"), float("inf")
    table, one = torch.arange(4, dtype=torch.int32)[None], torch.tensor([0, 1], dtype=torch.int32)
    lengths = torch.tensor([60], dtype=torch.int32)
    paged = lambda x: torch.cat([x, x.new_full((4, 2, 64), 7.0)]).view(4, 16, 2, 64)
    for window in ((4, 0), (50, -1)):
        options = {"window_size": window, "backend": NAME}
        packed, packed_bad = (attention_varlen(q, *kv, one, one * 60, 1, 60, **options) for kv in ((k, v), (bad_k, bad_v)))
        in_pages = attention_varlen(q, paged(bad_k), paged(bad_v), one, None, 1, 60, block_table=table, seqused_k=lengths, **options)
        assert torch.equal(packed, packed_bad) and torch.equal(packed, in_pages)


# ---- documented bounds: where the backend turns another way, and where the references refuse ------------------------------------------


def paged_decode(pages, table, lengths):
    """The two query heads of each sequence over the pages by the backend: which ways to call an operator it took."""
    before = Counter(ascend_operators.calls)
    q = torch.randn(len(lengths), 2, 64).half()
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32)
    attention_varlen(q, pages, pages, starts, None, 1, max(lengths), block_table=torch.tensor(table, dtype=torch.int32),
                     seqused_k=torch.tensor(lengths, dtype=torch.int32), backend=NAME)
    return {key[0] for key in ascend_operators.calls - before}


def test_sequences_that_share_pages_are_gathered():
    """The operator wants as many blocks in the pool as all sequences have together: a shared prefix breaks that."""
    assert paged_decode(torch.randn(1, 128, 2, 64).half(), [[0], [0], [0]], [100, 90, 80]) == {"fusion"}
    assert paged_decode(torch.randn(3, 128, 2, 64).half(), [[0], [0], [0]], [100, 90, 80]) == {"infer"}


def test_a_pool_beyond_int32_is_gathered(monkeypatch):
    pages = torch.randn(2, 16, 2, 64).half()
    monkeypatch.setattr(limits, "MAX_POOL", pages.numel() - 1)
    monkeypatch.setitem(ascend_operators.bounds, "pool", pages.numel() - 1)
    assert paged_decode(pages, [[0], [1]], [10, 16]) == {"fusion"}


def test_more_packed_tokens_and_sequences_than_a_call_takes_are_several_calls(monkeypatch):
    monkeypatch.setattr(limits, "MAX_PACKED_TOKENS", 70)
    monkeypatch.setattr(limits, "MAX_PACKED_SEQUENCES", 3)
    monkeypatch.setitem(ascend_operators.bounds, "T", 70)
    monkeypatch.setitem(ascend_operators.bounds, "sequences", 3)
    lengths = ((5, 60), (7, 11), (0, 9), (30, 30), (30, 60), (1, 1), (2, 2), (3, 3), (4, 4))
    for options in ({"is_causal": True}, {"window_size": (6, 1), "poison": "nan"}, {"page_size": 16}):
        before = ascend_operators.calls.total()
        check(AttentionCase("many", sequences=lengths, lse="always", **options), NAME)
        assert ascend_operators.calls.total() - before >= 5


@pytest.mark.parametrize("bound, words, call", [
    ("S at one query", "S 33 at Sq 1", lambda npu, x: npu.npu_fused_infer_attention_score(
        x[:, :, :1].contiguous(), x, x, num_heads=2, input_layout="BNSD")),
    ("S", "S 33 at Sq 33", lambda npu, x: npu.npu_fused_infer_attention_score(x, x, x, num_heads=2, input_layout="BNSD")),
    ("S of fusion", "S 33", lambda npu, x: npu.npu_fusion_attention(x, x, x, 2, "BNSD")),
    ("T", "T 33", lambda npu, x: npu.npu_fusion_attention(*[x[0].transpose(0, 1).contiguous()] * 3, 2, "TND", actual_seq_qlen=[33],
                                                          actual_seq_kvlen=[33])),
    ("sequences", "too many", lambda npu, x: npu.npu_fusion_attention(
        *[x[0].transpose(0, 1).contiguous()] * 3, 2, "TND", actual_seq_qlen=list(range(1, 34)), actual_seq_kvlen=list(range(1, 34)))),
])
def test_references_hold_the_documented_lengths(bound, words, call, monkeypatch):
    npu, x = EmulatedLauncher().load(), torch.ones(1, 2, 33, 16, dtype=torch.float16)
    call(npu, x)
    monkeypatch.setitem(ascend_operators.bounds, bound, 32)
    with pytest.raises(Refused, match=words):
        call(npu, x)


def test_lengths_are_read_once_while_they_stay(monkeypatch):
    read, lengths = [], torch.tensor([3, 5], dtype=torch.int32)
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: read.append(1) or tolist(x))
    assert on_host(lengths) == on_host(lengths) == [3, 5] and len(read) == 1
    lengths += 1                                                    # as a decode loop writes them
    assert on_host(lengths) == [4, 6] and len(read) == 2
    assert on_host(lengths.clone()) == [4, 6] and len(read) == 3
    with torch.inference_mode():
        uncounted = torch.tensor([1])
        assert on_host(uncounted) == on_host(uncounted) == [1] and len(read) == 5


# ---- negative controls: the fault in the translation, and a case that must show it --------------------------------------------


def without(name):
    return lambda args, kwargs: (args, {key: value for key, value in kwargs.items() if key != name})


def with_(**changes):
    def change(args, kwargs):
        return args, kwargs | {key: new(kwargs[key]) for key, new in changes.items() if kwargs.get(key) is not None}

    return change


INFER, FUSION = "npu_fused_infer_attention_score", "npu_fusion_attention"
CAUSAL = AttentionCase("causal", q_len=20, kv_len=33, is_causal=True, **HALF)
BAND = AttentionCase("band", q_len=20, kv_len=33, window_size=(4, 2), **HALF)
PACKED = AttentionCase("packed", sequences=((5, 9), (7, 7), (3, 20)), is_causal=True, lse="always")
PAGED = AttentionCase("paged", sequences=((1, 40), (1, 17)), page_size=16, lse="always", **HALF)
MASKED = AttentionCase("masked", mask="random", mask_axes="b1qk", q_len=20, kv_len=33, **HALF)
EMPTIED = AttentionCase("emptied", mask="empty rows", q_len=20, kv_len=33, lse="always", **HALF)

FAULTS = {
    "wrong keyword": (INFER, lambda args, kwargs: (args, kwargs | {"is_causal": True}), CAUSAL),
    "scale under the older name": (INFER, lambda args, kwargs: (args, kwargs | {"scale_value": kwargs["scale"]}), CAUSAL),
    "polarity of a mask": (INFER, with_(atten_mask=lambda mask: ~mask), MASKED),
    "polarity of the compressed mask": (INFER, with_(atten_mask=lambda mask: ~mask), CAUSAL),
    "top-left causal": (INFER, with_(sparse_mode=lambda mode: 2 if mode == 3 else mode), CAUSAL),
    "no next_tokens": (INFER, without("next_tokens"), BAND),
    "no pre_tokens": (INFER, without("pre_tokens"), BAND),
    "band counted from the top-left": (INFER, with_(sparse_mode=lambda mode: 0 if mode == 4 else mode,
                                                    atten_mask=lambda mask: torch.zeros(1, 1, 20, 33, dtype=torch.bool)), BAND),
    "no scale": (INFER, without("scale"), CAUSAL),
    "no heads of keys": (INFER, without("num_key_value_heads"), CAUSAL),
    "lengths not cumulative": (FUSION, with_(actual_seq_qlen=lambda ends: [b - a for a, b in zip([0, *ends], ends)]), PACKED),
    "statistics heads first": (FUSION, without("softmax_layout"), PACKED),
    "no mask with a sparse mode": (FUSION, without("atten_mask"), PACKED),
    "next_tockens spelled rightly": (FUSION, lambda args, kwargs: (args, kwargs | {"next_tokens": 0}), PACKED),
    "lengths of pages left out": (INFER, without("actual_seq_lengths_kv"), PAGED),
    "block table of the wrong kind": (INFER, with_(block_table=lambda table: table.long()), PAGED),
    "one page too few": (INFER, with_(actual_seq_lengths_kv=lambda lens: [x - 1 for x in lens]), PAGED),
    "keys not contiguous": (INFER, lambda args, kwargs: ((args[0], *(x.mT.contiguous().mT for x in args[1:])), kwargs), CAUSAL),
    "float mask": (FUSION, with_(atten_mask=lambda mask: mask.float()), EMPTIED),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_translation_is_caught(fault):
    operator, change, case = FAULTS[fault]
    check(case, NAME)                                               # the sound translation passes
    with emulated("ascend-faulty", altered(load_torch_npu(), operator, change)) as name:
        try:
            complaints = broken_promises(case, name)
        except (RuntimeError, TypeError, ValueError, AssertionError) as refused:
            assert not isinstance(refused, UnsupportedError), refused
            return                                                  # the schema, the documentation's limits or the meta kernel refused it
        assert complaints, f"{fault}: nobody noticed"


def test_references_refuse_what_the_documentation_forbids():
    npu = EmulatedLauncher().load()
    q = torch.ones(1, 2, 4, 16, dtype=torch.float16)
    call = lambda *args, **kwargs: npu.npu_fused_infer_attention_score(*args, **{"num_heads": 2, "input_layout": "BNSD"} | kwargs)
    with pytest.raises(Refused, match="D 8"):
        call(*[q[..., :8].contiguous()] * 3)
    with pytest.raises(Refused, match="dtype"):
        call(*[q.float()] * 3)
    with pytest.raises(Refused, match="2048"):
        call(q, q, q, sparse_mode=3, atten_mask=torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(Refused, match="no key"):
        npu.npu_fusion_attention(q[0].transpose(0, 1), *[q[0, :, :1].transpose(0, 1)] * 2, 2, "TND", actual_seq_qlen=[4],
                                 actual_seq_kvlen=[1], sparse_mode=3, atten_mask=torch.ones(2048, 2048, dtype=torch.bool).triu(1))


def test_the_mask_is_one_a_device():
    backend = registry.get(NAME)
    check(CAUSAL, NAME)
    first = backend._operators.compressed.on(torch.device("cpu"))
    check(BAND, NAME)
    assert backend._operators.compressed.on(torch.device("cpu")) is first and first.numel() == 2048**2


def test_schemas_are_the_wheels():
    torch_npu = load_torch_npu()
    assert torch_npu.__version__.startswith("2.13.0")
    assert sum(schema.name.startswith("npu::") for schema in torch._C._jit_get_all_schemas()) > 400
    assert "next_tockens" in str(torch.ops.npu.npu_fusion_attention.default._schema)
