"""The table of environment variables holds every one the code reads, and a misspelt one is warned about, once."""

import re
import warnings
from pathlib import Path

import pytest

from hetero_attn import environment
from hetero_attn.environment import VARIABLES, unknown_variables, warn_unknown_variables

CHECKOUT = Path(environment.__file__).parent.parent


def test_a_misspelt_variable_is_named_with_the_nearest():
    environ = {"HETERO_ATTN_BACKND": "x", "HETERO_ATTN_ZZZ": "1", "HETERO_ATTN_PROFILE": "cpu", "PATH": "/bin"}
    assert unknown_variables(environ) == {"HETERO_ATTN_BACKND": "HETERO_ATTN_BACKEND", "HETERO_ATTN_ZZZ": None}


def test_the_warning_comes_once(monkeypatch):
    monkeypatch.setattr(environment, "_warned", set())
    with pytest.warns(UserWarning) as caught:
        warn_unknown_variables({"HETERO_ATTN_PROFIL": "cpu", "HETERO_ATTN_ZZZ": "1"})
    assert [str(w.message) for w in caught] == [
        "unknown environment variable HETERO_ATTN_PROFIL has no effect; did you mean HETERO_ATTN_PROFILE?",
        f"unknown environment variable HETERO_ATTN_ZZZ has no effect; known are {', '.join(VARIABLES)}"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_unknown_variables({"HETERO_ATTN_PROFIL": "cpu", **dict.fromkeys(VARIABLES, "1")})
        with pytest.raises(UserWarning, match="HETERO_ATTN_PROFILES"):
            warn_unknown_variables({"HETERO_ATTN_PROFILES": "1"})


def test_every_variable_the_code_names_is_in_the_table():
    sources = [*(CHECKOUT / "hetero_attn").rglob("*.py"), *(CHECKOUT / "backends").rglob("*.py")]
    named = {name for path in sources for name in re.findall(r"\bHETERO_ATTN_[A-Z_]+\b", path.read_text(encoding="utf-8"))}
    assert {"HETERO_ATTN_SET", "HETERO_ATTN_CONFIG_DIR"} <= named
    assert sorted(name for name in named if name.rstrip("_") not in VARIABLES and name != environment.PREFIX) == []
