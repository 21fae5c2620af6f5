"""backend x case: what `pytest --pyargs hetero_attn.testing` runs.

HETERO_ATTN_TEST_BACKENDS=name,name chooses the backends (default: all that are available), HETERO_ATTN_TEST_DEVICE the device,
HETERO_ATTN_FULL=1 the full grid. A case that a backend objects to is skipped with the backend's own reasons; a backend that
objects to everything, or that was named and is not available, fails.
"""

from collections import Counter
from dataclasses import replace

import pytest

from hetero_attn import registry
from hetero_attn.backend import UnsupportedError
from hetero_attn.testing import attention
from hetero_attn.testing.attention_cases import attention_cases, plain_cases

CASES = attention_cases()
TARGETS = [(backend, device) for backend in attention.selected_backends() for device in attention.devices_of(backend)]
TARGET_IDS = [f"{backend}-{device}" for backend, device in TARGETS]
on_every_target = pytest.mark.parametrize(("backend", "device"), TARGETS, ids=TARGET_IDS)


@pytest.mark.parametrize(("case", "backend", "device"), [
    pytest.param(case, backend, device, id=f"{backend}-{device}-{case.name}") for case in CASES for backend, device in TARGETS
])
def test_attention(case, backend, device):
    try:
        attention.check(case, backend, device)
    except UnsupportedError as objection:
        pytest.skip("; ".join(objection.reasons.get(backend, [])) or str(objection))


@on_every_target
def test_backend_is_available_and_runs_something(backend, device):
    assert registry.get(backend).unavailable_reasons() == []
    objections = [registry.get(backend).unsupported_reasons(case.spec(device)) for case in plain_cases()]
    assert [] in objections, f"{backend} objects to every plain call on {device}: {objections}"


@on_every_target
def test_reasons_say_what_to_do_without_the_device(backend, device):
    """unsupported_reasons is a list of lines, the same whatever device the machine has, and never touches one."""
    for case, kind in ((case, kind) for case in CASES for kind in ("cpu", "cuda", "npu")):
        reasons = registry.get(backend).unsupported_reasons(replace(case.spec(), device=kind))
        assert isinstance(reasons, list) and all(isinstance(line, str) and line.strip() for line in reasons), (case.name, reasons)


@on_every_target
def test_backend_keeps_its_promise_not_to_judge_lengths(backend, device):
    """judges_lengths = False: the objections depend on lengths only through 0, 1, and q_len against kv_len."""
    if registry.get(backend).judges_lengths:
        pytest.skip(f"{backend} judges lengths, every call is decided anew")
    longer = {0: 0, 1: 1}
    for case in CASES:
        spec = case.spec(device)
        for factor in (3, 1000):
            q_len = longer.get(spec.q_len, factor * spec.q_len)
            kv_len = longer.get(spec.kv_len, factor * spec.kv_len)
            if (q_len > kv_len, q_len == kv_len) != (spec.q_len > spec.kv_len, spec.q_len == spec.kv_len):
                continue
            grown = replace(spec, q_len=q_len, kv_len=kv_len, batch=longer.get(spec.batch, 7 * spec.batch),
                            total_q=longer.get(spec.total_q, 7 * factor * spec.total_q))
            reasons = registry.get(backend).unsupported_reasons
            assert bool(reasons(spec)) == bool(reasons(grown)), f"{case.name}: {reasons(spec)} grew into {reasons(grown)} for {grown}"


def test_every_case_has_its_own_name():
    assert [name for name, count in Counter(case.name for case in CASES).items() if count > 1] == []


def test_poison_spares_some_rows():
    """A poisoned case whose every row sees poison would compare nothing."""
    for case in CASES:
        rows = case.untouched_rows()
        assert not case.poison or rows.any(), case.describe()
