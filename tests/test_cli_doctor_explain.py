"""hetero-attn doctor and explain as a person runs them: what they print, as JSON too, and one line for every kind of bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hetero_attn.cli import main
from hetero_attn.cli.doctor import missing_kernels

ROOT = Path(__file__).parents[1]
ISSUE_CALL = ["explain", "--q", "1,32,4096,128", "--kv", "1,8,4096,128", "--dtype", "bfloat16", "--causal", "--profile", "v100"]


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_explain_judges_and_names_the_absent(capsys):
    code, out, err = run(capsys, *ISSUE_CALL)
    assert code == 0 and err == ""
    assert "q [1, 32, 4096, 128]  kv [1, 8, 4096, 128]  bfloat16  causal  cuda" in out
    lines = {line.split()[0]: line for line in out.splitlines() if line[0] != " "}
    assert {"sdpa", "volta", "reference"} <= set(lines)
    assert "cast to float16" in out                               # a value (bfloat16), a bound and a remedy
    assert lines["choice"].split()[1] in ("sdpa", "volta")


def test_explain_as_json(capsys):
    _, out, _ = run(capsys, *ISSUE_CALL, "--json")
    report = json.loads(out)
    assert report["profile"].startswith("v100") and report["device"] == "cuda"
    assert {b["name"] for b in report["backends"]} >= {"sdpa", "volta", "reference"}


def test_explain_reaches_every_feature(capsys):
    code, out, _ = run(
        capsys, "explain", "--q", "4,32,7,64", "--kv", "4,8,4096,64", "--v-dim", "32", "--dtype", "float16", "--window=128,0", "--softcap",
        "30", "--alibi", "batch", "--sinks", "--lse", "--page-size", "16", "--scale", "0.5", "--profile", "cpu",
    )
    assert code == 0
    for feature in ("window (128, 0)", "softcap 30", "alibi", "sinks", "lse", "varlen", "pages of 16", "v_head_dim 32"):
        assert feature in out
    shapes = ("--q", "1,4,7,64", "--kv", "1,4,7,64")
    _, out, _ = run(capsys, "explain", *shapes, "--mask", "bool", "--grad", "--layout", "bshd", "--profile", "cpu")
    assert "bool mask" in out and "gradients" in out


def test_explain_where_nothing_runs(capsys):
    code, out, _ = run(capsys, *ISSUE_CALL, "--set", "backends=[missing]")
    assert code == 1 and "choice     none: no backend of profile 'v100'" in out


BAD = {
    "shape of three": (["explain", "--q", "1,2,3", "--kv", "1,2,3,4"], "--q is '1,2,3', expected B,Hq,Sq,D: 4 integers"),
    "not integers": (["explain", "--q", "1,2,x,4", "--kv", "1,2,3,4"], "--q is '1,2,x,4', expected B,Hq,Sq,D"),
    "too large": (["explain", "--q", "1,2,3,4", "--kv", "1,2,99999999999999999999,4"], "expected B,Hkv,Skv,D with a product below 2**56"),
    "heads": (["explain", "--q", "1,5,3,4", "--kv", "1,2,3,4"], "q has 5 heads and k has 2: expected the query heads to be a multiple"),
    "head_dim": (["explain", "--q", "1,4,3,8", "--kv", "1,2,3,4"], "expected q's head dimension 8"),
    "dtype": (["explain", "--q", "1,4,3,8", "--kv", "1,2,3,8", "--dtype", "int8"], "--dtype is 'int8', expected one of float32"),
    "window": (["explain", "--q", "1,4,3,8", "--kv", "1,2,3,8", "--window=-3,0"], "--window is '-3,0', expected LEFT,RIGHT"),
    "softcap": (["explain", "--q", "1,4,3,8", "--kv", "1,2,3,8", "--softcap", "-1"], "softcap is -1.0, expected a number of at least 0"),
    "layout": (["explain", "--q", "1,4,3,8", "--kv", "1,2,3,8", "--layout", "sbhd"], "layout is 'sbhd', expected one of"),
    "profile": (["doctor", "--profile", "h10"], "unknown profile 'h10'; did you mean h100?"),
    "profile file": (["doctor", "--profile", "no/such.yaml"], "no/such.yaml does not exist"),
    "profile key": (["doctor", "--set", "hardware.memry_gib=3"], "memory_gib"),
    "backend": ([*ISSUE_CALL, "--backend", "sdpq"], "unknown backend 'sdpq': did you mean 'sdpa'?"),
    "command": (["docter"], "docter"),
    "no command": ([], "COMMAND"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(capsys, arguments, words):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == ""
    assert err.startswith("hetero-attn: error: ") and err.count("\n") == 1 and words in err


def test_doctor(capsys):
    code, out, _ = run(capsys, "doctor", "--profile", "v100", "--set", "strict=true")
    assert code == 0
    assert "sdpa" in out and "volta" in out
    settings = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ") and len(line.split()) > 2}
    assert settings["strict"].endswith("--set") and "v100.yaml:" in settings["backends"] and settings["vocabulary"].endswith("built-in")


def test_doctor_says_something_of_every_communicator(capsys):
    main(["doctor", "--profile", "cpu", "--set", "communicators=[cpu,sdpa,distributed]"])
    lines = capsys.readouterr().out.splitlines()
    listed = dict(line.split(maxsplit=1) for line in lines[lines.index("communicators") + 1 :][:3])
    assert listed["sdpa"] == "backend 'sdpa' has no communicator; take it out of communicators" and "gloo" in listed["distributed"]
    assert listed["cpu"].startswith(("can be had here", "no C++ compiler")) and "over" not in listed["cpu"]


def test_doctor_as_json_in_a_process_of_its_own(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}", "HETERO_ATTN_BAKEND": "sdpa"}
    command = [sys.executable, "-m", "hetero_attn", "doctor", "--json"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    report = json.loads(result.stdout)
    assert report["unknown_variables"] == ["HETERO_ATTN_BAKEND"] and "did you mean HETERO_ATTN_BACKEND" in result.stderr
    assert next(b for b in report["backends"] if b["name"] == "sdpa")["runs_here"]
    assert {"key", "value", "origin"} <= set(report["settings"][0])


def test_doctor_survives_packages_that_do_not(tmp_path):
    broken = {"exits": "raise SystemExit(3)", "empty": "", "garbled": "def (", "deaf": (
        "from hetero_attn.backend import Backend\nclass backend(Backend):\n    def unavailable_reasons(self): raise OSError('no answer')\n"
    )}
    for name, text in broken.items():
        (tmp_path / f"hetero_attn_{name}").mkdir()
        (tmp_path / f"hetero_attn_{name}" / "__init__.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}:{tmp_path}"}
    command = [sys.executable, "-m", "hetero_attn", "doctor", "--json"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    reasons = {b["name"]: " ".join(b["reasons"]) for b in json.loads(result.stdout)["backends"]}
    assert "SystemExit: 3" in reasons["exits"] and "no attribute 'backend'" in reasons["empty"] and "SyntaxError" in reasons["garbled"]
    assert "OSError: no answer" in reasons["deaf"] and reasons["sdpa"] == ""


@pytest.mark.parametrize(("capability", "architectures", "has"), [
    ((7, 0), ["sm_70", "sm_80"], True), ((7, 0), ["sm_75", "sm_80", "sm_90"], False), ((8, 6), ["sm_80"], True), ((8, 0), ["sm_86"], False),
    ((9, 0), ["sm_90a"], True), ((12, 0), ["sm_90", "compute_90"], True), ((7, 0), ["compute_75"], False),
])
def test_a_torch_without_kernels_for_the_gpu_is_told(capability, architectures, has):
    remark = missing_kernels(capability, architectures)
    assert (remark is None) == has
    if capability == (7, 0) and not has:
        assert "compute capability 7.0" in remark and "CUDA 12.6" in remark


def test_the_probe_uses_a_dtype_the_backend_has():
    from hetero_attn import registry
    from hetero_attn.backend import Backend
    from hetero_attn.cli.doctor import diagnosis
    from hetero_attn.reference import ReferenceBackend

    class SingleOnly(ReferenceBackend):
        def unsupported_reasons(self, spec):
            return [] if str(spec.dtype) == "torch.float32" else [f"dtype is {spec.dtype}, this has float32"]

    class Nothing(Backend):
        def unsupported_reasons(self, spec):
            return ["never"]

    with registry.register("singleonly", SingleOnly), registry.register("nothing", Nothing):
        found = {b["name"]: b for b in diagnosis("cpu", [])["backends"]}
    assert found["singleonly"]["runs_here"]
    assert not found["nothing"]["runs_here"] and found["nothing"]["reasons"] == ["never"]


def test_shortened_options_are_refused(capsys):
    code, _, err = run(capsys, "doctor", "--profil", "cpu")
    assert code == 2 and "--profil" in err


def test_a_device_without_a_profile_is_judged_too(capsys):
    code, out, _ = run(capsys, "explain", "--q", "1,4,7,64", "--kv", "1,4,7,64", "--device", "mps")
    assert code == 0 and " mps" in out


def test_a_backend_that_computes_wrongly_does_not_pass_the_doctor():
    from hetero_attn import registry
    from hetero_attn.backend import Backend
    from hetero_attn.cli.doctor import diagnosis

    class Wrong(Backend):
        name = "wrong"

        def unsupported_reasons(self, spec):
            return []

        def attention(self, q, k, v, spec, operands):
            return q * 2, None

    with registry.register("wrong", Wrong):
        report = diagnosis("cpu", ["backends=[wrong, sdpa]"])
    wrong = next(b for b in report["backends"] if b["name"] == "wrong")
    assert not wrong["runs_here"] and "wrong by" in wrong["reasons"][0]
