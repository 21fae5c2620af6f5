"""explain(): every backend judged with value, bound and remedy; absent ones named; nothing run, no memory needed."""

import pytest
import torch

import hetero_attn
from hetero_attn import registry
from hetero_attn.backend import Backend
from hetero_attn.explain import explain_spec
from hetero_attn.spec import AttentionSpec


class HalfOnly(Backend):
    """A backend as Volta's will be: fp16 only, and its device is not here."""

    name = "halfonly"

    def unavailable_reasons(self):
        return ["no CUDA device of compute capability 7.0 here"]

    def unsupported_reasons(self, spec):
        if spec.dtype != torch.float16:
            return ["dtype is bfloat16, kernel has float16 only (Volta has no bf16 tensor cores); cast to float16"]
        return []


SPEC = AttentionSpec("cuda", torch.bfloat16, 1, 32, 8, 4096, 4096, 128, 128, is_causal=True, scale=128**-0.5)


def test_every_backend_is_judged_where_its_device_is_absent():
    with registry.register("halfonly", HalfOnly):
        v100 = hetero_attn.load_profile("v100", sets=["backends=[halfonly, sdpa]"])
        explanation = explain_spec(SPEC, v100)
        judged = {j.backend: j for j in explanation.judgments}
        assert judged["halfonly"].unsupported[0].endswith("cast to float16") and judged["halfonly"].unavailable
        assert explanation.chosen == "sdpa"
        text = str(explanation)
        assert "q [1, 32, 4096, 128]  kv [1, 8, 4096, 128]  bfloat16  causal  cuda" in text
        assert "cannot: dtype is bfloat16, kernel has float16 only" in text
        assert "here: unavailable: no CUDA device" in text
        as_half = explain_spec(AttentionSpec("cuda", torch.float16, 1, 32, 8, 4096, 4096, 128, 128), v100)
        assert "halfonly   runs this call" in str(as_half)                 # expressible, though its device is not here
        assert as_half.chosen == "sdpa"                                    # what would run on this machine


def test_strict_is_part_of_the_judgment():
    with registry.register("halfonly", HalfOnly):
        strict = hetero_attn.load_profile("v100", sets=["backends=[halfonly, sdpa]", "strict=true"])
        explanation = explain_spec(SPEC, strict)
    assert explanation.chosen is None and "no backend of profile 'v100' (strict)" in explanation.refusal
    assert "excluded by strict: true" in str(explanation)


def test_awaited_backends_are_named():
    explanation = explain_spec(SPEC, hetero_attn.load_profile("v100"))
    volta = next(j for j in explanation.judgments if j.backend == "volta")
    assert volta.absent or volta.unsupported or volta.unavailable          # absent until its package exists
    assert "volta" in str(explanation)


def test_the_device_s_numbers_speak():
    explanation = explain_spec(SPEC, hetero_attn.load_profile("v100"))
    assert any("bfloat16" in note and "float16" in note for note in explanation.notes)


def test_explain_runs_nothing_and_needs_no_memory():
    q, kv = torch.empty(8, 32, 1 << 20, 128, device="meta"), torch.empty(8, 8, 1 << 20, 128, device="meta")
    explanation = hetero_attn.explain(q, kv, kv, is_causal=True)
    assert explanation.spec.q_len == 1 << 20


def test_explaining_says_nothing_in_the_log(caplog):
    registry._logged.clear()
    q = torch.zeros(1, 4, 3, 16)
    with hetero_attn.use_profile(hetero_attn.load_profile("cpu", sets=["backends=[missing, sdpa]"])):
        hetero_attn.explain(q, q, q)
        assert not caplog.records
        hetero_attn.attention(q, q, q, scale=0.123)                         # and leaves the call its own message
    assert "attention falls to sdpa" in caplog.text


def test_the_choice_has_the_name_it_is_registered_by():
    with registry.register("halfonly-emulated", HalfOnly):                  # HalfOnly calls itself halfonly
        with registry.register("plain", lambda: registry.get("sdpa")):
            q = torch.zeros(1, 4, 3, 16)
            assert hetero_attn.explain(q, q, q, backend="plain").chosen == "plain"
            assert hetero_attn.explain(q, q, q, backend="halfonly-emulated").chosen is None


def test_gradients_of_every_operand_count():
    q = torch.zeros(1, 4, 3, 16)
    for name, shape in (("attn_mask", (3, 3)), ("sinks", (4,)), ("alibi_slopes", (4,))):
        assert hetero_attn.explain(q, q, q, **{name: torch.zeros(shape, requires_grad=True)}).spec.needs_grad


def test_what_is_no_tensor_is_named():
    with pytest.raises(TypeError, match=r"q is list, expected a torch\.Tensor"):
        hetero_attn.explain([1.0], torch.zeros(1, 4, 3, 16), torch.zeros(1, 4, 3, 16))


def test_remarks_tell_the_slow_route():
    q, kv = torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 3, 16)
    sdpa = next(j for j in hetero_attn.explain(q, kv, kv, softcap=30.0).judgments if j.backend == "sdpa")
    assert sdpa.remarks == ("composed in torch, not fused: softcap is 30, SDPA has none",)


def test_varlen_and_dict():
    q, kv = torch.zeros(5, 4, 16), torch.zeros(9, 2, 16)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)
    explanation = hetero_attn.explain(q, kv, kv, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], max_seqlen_q=3, max_seqlen_k=5)
    assert explanation.spec.varlen and explanation.spec.batch == 2
    as_dict = explanation.to_dict()
    assert as_dict["chosen"] == hetero_attn.load_profile("cpu").backends[0]
    assert {b["name"] for b in as_dict["backends"]} >= {"sdpa", "reference"}
