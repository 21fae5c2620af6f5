"""hopper with flashinfer: which calls it serves, conformance by a stand-in with the documented signatures, plans made once a step."""

from dataclasses import replace
from types import SimpleNamespace

import hopper_flashinfer
import pytest
import torch
from hetero_attn_hopper import HopperBackend
from hetero_attn_hopper.flash_attn import FlashAttnPackage
from hetero_attn_hopper.flashinfer import FlashInferPackage
from hetero_attn_hopper.package import serving
from hopper_operators import ReferenceOperators

import hetero_attn
from hetero_attn import registry
from hetero_attn.backend import UnsupportedError
from hetero_attn.spec import AttentionSpec
from hetero_attn.testing.attention import check
from hetero_attn.testing.cases import AttentionCase

NAME = "hopper-emulated-flashinfer"
HERE, ABSENT = FlashInferPackage("hopper_flashinfer"), FlashAttnPackage("no_flash_attn_here")
BASE = AttentionSpec("cuda", torch.bfloat16, 2, 32, 8, 512, 512, 128, 128, is_causal=True, scale=0.1)
PAGED = {"varlen": True, "total_q": 2, "q_len": 1, "page_size": 64}
RUNS = {
    "softcap": {"softcap": 30.0}, "softcap, window, lse": {"softcap": 30.0, "window_size": (63, 0), "return_lse": True, "sinks": True},
    "softcap, left window alone": {"softcap": 30.0, "is_causal": False, "window_size": (63, -1)},
    "pages of 64": PAGED, "pages of 1": PAGED | {"page_size": 1}, "pages, softcap": PAGED | {"softcap": 30.0},
}
OBJECTIONS = {
    "head": ({"softcap": 30.0, "head_dim": 96, "v_head_dim": 96}, "head_dim is 96, flashinfer has 64, 128, 256; or use backend 'triton'"),
    "alibi": ({"alibi": 1}, "alibi: flashinfer has slopes of its own and takes none"),
    "right": ({"softcap": 30.0, "is_causal": False, "window_size": (3, 5)}, "the window ends 5 keys to the right, flashinfer ends it at"),
    "prefill on pages": (PAGED | {"q_len": 9}, "rows of a paged call see unlike keys"),
    "window on pages": (PAGED | {"window_size": (63, 0)}, "rows of a paged call see unlike keys"),
}


@pytest.fixture(scope="module")
def emulated():
    with registry.register(NAME, lambda: HopperBackend(ReferenceOperators(), packages=[ABSENT, FlashInferPackage("hopper_flashinfer")])):
        yield hopper_flashinfer


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_runs(options):
    backend, spec = HopperBackend(packages=[ABSENT, HERE]), replace(BASE, **options)
    assert backend.unsupported_reasons(spec) == [] and any("flashinfer, which has not been run" in each for each in backend.remarks(spec))
    assert bool(spec.varlen) == any("reads lengths back from the device" in each for each in backend.remarks(spec))


@pytest.mark.parametrize("options, words", OBJECTIONS.values(), ids=OBJECTIONS)
def test_objects(options, words):
    reasons = HopperBackend(packages=[ABSENT, HERE]).unsupported_reasons(replace(BASE, **options))
    assert any(words in reason for reason in reasons), reasons


def test_flash_attn_comes_first_where_it_serves():
    both = HopperBackend(packages=[FlashAttnPackage("hopper_flash_attn"), HERE]).packages
    assert serving(both, replace(BASE, softcap=30.0)).name == serving(both, replace(BASE, alibi=1)).name == "flash-attn"
    assert serving(both, replace(BASE, **PAGED | {"page_size": 512})).name == "flash-attn"
    assert serving(both, replace(BASE, **PAGED)).name == "flashinfer" and serving(both, replace(BASE, **PAGED, head_dim=72)) is None


def test_what_to_install_is_said_of_both():
    absent = [ABSENT, FlashInferPackage("no_flashinfer_here")]
    reasons = HopperBackend(packages=absent).unsupported_reasons(replace(BASE, softcap=30.0))
    assert reasons[0] == ("softcap is 30, torch's kernels have none; install flash-attn 2.6.3 or later, below 3 or install "
                          "flashinfer-python 0.3.0 or later, or use backend 'triton' or 'sdpa'")


@pytest.mark.parametrize("version, names, words", [("0.2.9", FlashInferPackage.needed, "flashinfer is 0.2.9, install flashinfer-python"),
                                                   ("0.6.1", FlashInferPackage.needed[:1], "flashinfer is 0.6.1, install"),
                                                   ("0.3.1.post1", FlashInferPackage.needed, "")])
def test_which_packages_serve(monkeypatch, version, names, words):
    monkeypatch.setattr("importlib.import_module", lambda name: SimpleNamespace(__version__=version, **dict.fromkeys(names, len)))
    reasons = FlashInferPackage().reasons()
    assert reasons == [] if not words else words in reasons[0]


def cases():
    """What only the package expresses: dense alone and in a batch, packed, on pages; rows without keys, sinks, windows, poison."""
    one = {"dtype": torch.bfloat16, "q_heads": 6, "kv_heads": 2, "head_dim": 64, "softcap": 2.0, "lse": "always"}
    features = {"cap": {}, "causal": {"is_causal": True}, "sinks": {"sinks": torch.float32, "is_causal": True},
                "window": {"is_causal": True, "window_size": (3, -1)}, "left": {"window_size": (2, -1)},
                "right": {"window_size": (-1, 0)}, "poison": {"is_causal": True, "poison": "nan"}, "fp16": {"dtype": torch.float16}}
    for name, options in features.items():
        yield AttentionCase(f"alone-{name}", batch=1, q_len=6, kv_len=9, **one | options)
        yield AttentionCase(f"longer-{name}", batch=1, q_len=9, kv_len=6, **one | options)
        yield AttentionCase(f"batch-{name}", batch=2, q_len=9, kv_len=6, **one | options)
        yield AttentionCase(f"packed-{name}", sequences=((5, 9), (0, 4), (7, 7), (3, 0), (6, 2)), **one | options)
    paged = one | {"softcap": None}
    for page in (1, 16, 64):
        for name, options in {"plain": {}, "cap": {"softcap": 2.0}, "sinks": {"sinks": torch.float32}}.items():
            sequences = ((1, 70), (1, 5), (0, 3), (1, 0), (1, 64))
            yield AttentionCase(f"pages-{page}-{name}", sequences=sequences, page_size=page, **paged | options)


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.name)
def test_conforms(emulated, case):
    before = len(emulated.CALLS)
    check(case, NAME)
    kind = "paged" if case.page_size else "ragged" if case.sequences or case.batch > 1 else "single"
    assert set(emulated.CALLS[before:]) == {kind}


def decode(backend, q, k, v, table, lengths):
    starts = torch.arange(3, dtype=torch.int32) if backend == "reference" else STARTS
    return hetero_attn.attention_varlen(q, k, v, starts, None, 1, 40, block_table=table, seqused_k=lengths, backend=backend).float()


STARTS = torch.arange(3, dtype=torch.int32)          # the same tensor in every layer


def off(*call):
    return (decode(NAME, *call) - decode("reference", *call)).abs().max().item()


def test_a_plan_serves_all_layers_of_a_step_and_no_other_step(emulated):
    q, layers = torch.randn(2, 4, 64).bfloat16(), [[torch.randn(9, 8, 2, 64).bfloat16() for _ in range(2)] for _ in range(3)]
    table, lengths = torch.randperm(9)[:8].to(torch.int32).view(2, 4), torch.tensor([17, 3], dtype=torch.int32)
    for step in range(3):
        before = len(emulated.PLANS)
        assert max(off(q, k, v, table, lengths) for k, v in layers) < 0.02
        assert len(emulated.PLANS) == before + 1
        lengths.add_(1)                              # the next token
        table[0, 2] = (table[0, 2] + step) % 9       # and the tables are written, too
    with torch.inference_mode():
        other, before = lengths.clone(), len(emulated.PLANS)
        assert off(q, *layers[0], table, other) < 0.02
        other.add_(2)                                # torch does not count this, so it is planned anew
        assert off(q, *layers[0], table, other) < 0.02 and len(emulated.PLANS) == before + 2


def test_a_plan_under_capture_is_refused(monkeypatch):
    """By tensors that say they are on a device; the single call, which plans nothing, is not asked."""
    package = FlashInferPackage("hopper_flashinfer")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=5))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_device = SimpleNamespace(device="cuda:0", is_cuda=True)
    with pytest.raises(UnsupportedError, match="which a CUDA graph cannot hold; capture with backend='triton'"):
        package._plan("paged", on_device, (), (), lambda wrapper: False)
