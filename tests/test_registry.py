"""Who runs a call: precedence, reasons, strict mode, absent and broken backends, decisions that are remembered and voided."""

import contextvars
import logging
import sys
import threading

import pytest
import torch

import hetero_attn
from hetero_attn import ops, registry
from hetero_attn.backend import Backend, UnsupportedError

Q, KV = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)


class Marked(Backend):
    """Answers with a constant, so that a test sees who ran."""

    judges_lengths = False

    def __init__(self, name, mark, objection=None, judges_lengths=False):
        self.name, self.mark, self.objection, self.judges_lengths = name, mark, objection, judges_lengths
        self.asked = 0

    def unsupported_reasons(self, spec):
        self.asked += 1
        reason = self.objection(spec) if callable(self.objection) else self.objection
        return [reason] if reason else []

    def attention(self, q, k, v, spec, operands):
        return torch.full_like(q, self.mark), None


def profile(*backends, strict=False):
    return hetero_attn.load_profile("cpu", sets=[f"backends=[{', '.join(backends)}]", f"strict={str(strict).lower()}"])


def who(**options) -> float:
    return float(hetero_attn.attention(Q, KV, KV, **options)[0, 0, 0, 0])


@pytest.fixture
def one_and_two():
    one, two = Marked("one", 1.0), Marked("two", 2.0)
    with registry.register("one", lambda: one), registry.register("two", lambda: two):
        yield one, two


def test_precedence(one_and_two, monkeypatch):
    with hetero_attn.use_profile(profile("one", "two")):
        assert who() == 1.0
        monkeypatch.setenv("HETERO_ATTN_BACKEND", "two")
        assert who() == 2.0
        with hetero_attn.use_backend("one"):
            assert who() == 1.0
            assert who(backend="two") == 2.0
            with hetero_attn.use_backend(None):
                assert who() == 2.0                       # the inner block lifts the outer: the environment decides
        monkeypatch.delenv("HETERO_ATTN_BACKEND")
        assert who() == 1.0


def test_profile_named_in_the_environment(one_and_two, monkeypatch, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: cpu\nbackends: [two]\n")
    monkeypatch.setenv("HETERO_ATTN_PROFILE", str(file))
    assert who() == 2.0


def test_settings_in_the_environment_count_at_once(one_and_two, monkeypatch):
    monkeypatch.setenv("HETERO_ATTN_SET", "backends=[one]")
    assert who() == 1.0
    monkeypatch.setenv("HETERO_ATTN_SET", "backends=[two]")
    assert who() == 2.0


def test_a_thread_has_its_own_choice_and_a_copied_context_takes_it_along(one_and_two):
    ran = []
    with hetero_attn.use_profile(profile("two")), hetero_attn.use_backend("one"):
        context = contextvars.copy_context()
        for target in (lambda: ran.append(who(backend="two")), lambda: ran.append(context.run(who))):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        ran.append(who())
    assert ran == [2.0, 1.0, 1.0]


def test_automatic_choice_falls_through_and_says_so_once(one_and_two, caplog):
    one, _ = one_and_two
    one.objection = "head_dim is 16, kernel has from 32"
    registry._logged.clear()
    with hetero_attn.use_profile(profile("one", "two")), caplog.at_level(logging.INFO, "hetero_attn"):
        assert who() == 2.0 and who() == 2.0 and who(is_causal=True) == 2.0
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "head_dim is 16, kernel has from 32" in caplog.text


def test_named_backend_runs_or_raises_with_all_reasons(one_and_two):
    one, _ = one_and_two
    one.objection = "head_dim is 16, kernel has from 32"
    with pytest.raises(UnsupportedError) as caught:
        who(backend="one")
    assert caught.value.reasons == {"one": ["head_dim is 16, kernel has from 32"]}
    assert "q [1, 4, 3, 16]  kv [1, 2, 3, 16]  float32  cpu" in str(caught.value)


def test_strict_forbids_falling_through(one_and_two):
    one, two = one_and_two
    one.objection = "dtype is float32, kernel has float16 only; cast to float16"
    with hetero_attn.use_profile(profile("one", "two", strict=True)), pytest.raises(UnsupportedError) as caught:
        who()
    text = str(caught.value)
    assert text.splitlines()[0] == "no backend of profile 'cpu' (strict) runs this attention"
    assert "one  dtype is float32, kernel has float16 only; cast to float16" in text
    assert "two  excluded by strict: true" in text
    assert text.splitlines()[-1] == "see: hetero-attn doctor"
    assert two.asked == 0


def test_unknown_names(one_and_two):
    with pytest.raises(hetero_attn.UnknownBackendError, match=r"unknown backend 'sdpq': did you mean 'sdpa'\?.*known here: .*sdpa"):
        who(backend="sdpq")
    with pytest.raises(hetero_attn.UnknownBackendError), hetero_attn.use_backend("nothing"):
        pass


def test_the_environment_is_named_where_it_asked(one_and_two, monkeypatch):
    one, _ = one_and_two
    one.objection = "never"
    monkeypatch.setenv("HETERO_ATTN_BACKEND", "one")
    with pytest.raises(UnsupportedError, match=r"backend 'one' \(from HETERO_ATTN_BACKEND\) cannot run"):
        who()
    monkeypatch.setenv("HETERO_ATTN_BACKEND", "sdpq")
    with pytest.raises(hetero_attn.UnknownBackendError, match=r"unknown backend 'sdpq' \(from HETERO_ATTN_BACKEND\): did you mean"):
        who()


def test_names_that_are_none(one_and_two):
    with pytest.raises(hetero_attn.UnknownBackendError, match="unknown backend ''"):
        who(backend="")
    with pytest.raises(TypeError, match="backend is 5, expected a name: one of"):
        who(backend=5)


def test_absent_package_is_a_reason(one_and_two):
    with hetero_attn.use_profile(profile("missing", "two")):
        assert who() == 2.0
        explanation = hetero_attn.explain(Q, KV, KV)
    missing = next(j for j in explanation.judgments if j.backend == "missing")
    assert missing.absent and "no package hetero_attn_missing" in missing.unavailable[0]


def test_broken_import_is_a_reason(one_and_two):
    def broken():
        raise ImportError("libcuda.so.1: cannot open shared object file")

    with registry.register("broken", broken), hetero_attn.use_profile(profile("broken", "two")):
        assert who() == 2.0
        with pytest.raises(UnsupportedError, match=r"does not import: ImportError: libcuda"):
            who(backend="broken")


def test_a_broken_package_on_the_path_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "hetero_attn_smashed").mkdir()
    (tmp_path / "hetero_attn_smashed" / "__init__.py").write_text("import a_module_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry._found.cache_clear()
    try:
        assert "smashed" in registry.names()
        reasons = registry.get("smashed").unavailable_reasons()
        assert "ModuleNotFoundError: No module named 'a_module_nobody_has'" in reasons[0]
    finally:
        registry._found.cache_clear()
        registry._instances.pop("smashed", None)


@pytest.mark.parametrize(("factory", "words"), [
    (lambda: None, "`backend` gives a NoneType, expected a hetero_attn.backend.Backend"),
    (lambda: sys.exit(3), "does not import: SystemExit: 3"),
])
def test_a_package_that_gives_no_backend_is_a_reason(one_and_two, factory, words):
    with registry.register("odd", factory), hetero_attn.use_profile(profile("odd", "two")):
        assert who() == 2.0
        with pytest.raises(UnsupportedError, match=words):
            who(backend="odd")


def test_a_look_at_the_machine_that_fails_is_a_reason(one_and_two):
    class Faulty(Marked):
        def unavailable_reasons(self):
            raise OSError("the driver does not answer")

    with registry.register("faulty", lambda: Faulty("faulty", 3.0)), hetero_attn.use_profile(profile("faulty", "two")):
        assert who() == 2.0
        assert "failed: OSError: the driver does not answer" in str(hetero_attn.explain(Q, KV, KV))


def test_a_backend_that_is_not_here_does_not_cost_a_decision_a_length(one_and_two):
    class Elsewhere(Marked):
        def unavailable_reasons(self):
            return ["no such device on this machine"]

    _, two = one_and_two
    far = Elsewhere("far", 3.0, judges_lengths=True)
    with registry.register("far", lambda: far), hetero_attn.use_profile(profile("absent", "far", "two")):
        for kv_len in range(5, 40):
            kv = torch.zeros(1, 2, kv_len, 16)
            assert float(hetero_attn.attention(Q, kv, kv)[0, 0, 0, 0]) == 2.0
    assert two.asked == 1


def test_one_decision_serves_a_growing_cache(one_and_two):
    one, two = one_and_two
    one.objection = "always"
    with hetero_attn.use_profile(profile("one", "two")):
        for kv_len in range(5, 40):
            kv = torch.zeros(1, 2, kv_len, 16)
            assert float(hetero_attn.attention(Q, kv, kv)[0, 0, 0, 0]) == 2.0
    assert one.asked == 1 and two.asked == 1


def test_a_backend_that_judges_lengths_is_asked_at_every_length():
    def short(spec):
        return f"kv_len is {spec.kv_len}, kernel has up to 10" if spec.kv_len > 10 else None

    near, far = Marked("near", 1.0, short, judges_lengths=True), Marked("far", 2.0)
    with registry.register("near", lambda: near), registry.register("far", lambda: far), hetero_attn.use_profile(profile("near", "far")):
        ran = []
        for kv_len in (9, 10, 11, 12, 8, 30, 10):
            kv = torch.zeros(1, 2, kv_len, 16)
            ran.append(float(hetero_attn.attention(Q, kv, kv)[0, 0, 0, 0]))
    assert ran == [1.0, 1.0, 2.0, 2.0, 1.0, 2.0, 1.0]


def test_backends_see_the_lengths_of_this_call():
    seen = []

    class Looking(Marked):
        def attention(self, q, k, v, spec, operands):
            seen.append((spec.batch, spec.q_len, spec.kv_len))
            return q, None

    with registry.register("looking", lambda: Looking("looking", 0.0)):
        for batch, q_len, kv_len in ((1, 1, 7), (1, 1, 8), (3, 1, 8), (2, 4, 9), (1, 1, 7)):
            q, kv = torch.zeros(batch, 4, q_len, 16), torch.zeros(batch, 2, kv_len, 16)
            hetero_attn.attention(q, kv, kv, backend="looking")
    assert seen == [(1, 1, 7), (1, 1, 8), (3, 1, 8), (2, 4, 9), (1, 1, 7)]


def test_plans_are_bounded(one_and_two):
    with hetero_attn.use_backend("one"):
        for step in range(ops._PLANS_KEPT + 50):
            hetero_attn.attention(Q, KV, KV, scale=1.0 + step)
    assert len(ops._plans) <= ops._PLANS_KEPT


def test_removing_a_backend_voids_its_decisions():
    with registry.register("brief", lambda: Marked("brief", 7.0)):
        assert who(backend="brief") == 7.0
    with pytest.raises(hetero_attn.UnknownBackendError):
        who(backend="brief")


def test_gradients_fall_to_a_backend_that_has_them(one_and_two):
    one, _ = one_and_two
    one.objection = lambda spec: "no backward; call under torch.no_grad()" if spec.needs_grad else None
    q = Q.clone().requires_grad_()
    with hetero_attn.use_profile(profile("one", "sdpa")):
        with torch.no_grad():
            assert float(hetero_attn.attention(q, KV, KV)[0, 0, 0, 0]) == 1.0
        hetero_attn.attention(q, KV, KV).sum().backward()
    assert q.grad is not None and q.grad.abs().sum() > 0


def test_reference_is_never_automatic():
    for name in hetero_attn.profile.shipped_profiles():
        assert "reference" not in hetero_attn.load_profile(name).backends
        assert hetero_attn.load_profile(name).backends[-1] == "sdpa"
