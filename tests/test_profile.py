"""The shipped profiles, the dataclasses behind them, and which device gets which."""

import ast
import dataclasses
import math
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetero_attn import profile as profile_module
from hetero_attn.profile import (
    WHOLE_PAGES,
    Alignments,
    Detect,
    DeviceProfile,
    Hardware,
    Overlap,
    ProfileError,
    detect,
    load_profile,
    shipped_profiles,
)
from hetero_attn.profile_detect import choose, device_name, present_device
from hetero_attn.profile_fields import leaves, sections

PACKAGE = Path(profile_module.__file__).parent


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HETERO_ATTN_CONFIG_DIR", str(tmp_path_factory.mktemp("config")))
    monkeypatch.delenv("HETERO_ATTN_PROFILE", raising=False)
    monkeypatch.delenv("HETERO_ATTN_SET", raising=False)


def test_the_shipped_profiles_are_these():
    assert list(shipped_profiles()) == ["a100", "ascend910a", "ascend910b", "cpu", "cuda", "edge", "h100", "h200", "mi300x", "rtx4090",
                                        "v100"]


@pytest.mark.parametrize("name", shipped_profiles())
def test_a_shipped_profile_loads_and_ends_in_what_every_device_runs(name):
    profile = load_profile(name)
    assert profile.name == name
    assert profile.backends[-1] == "sdpa" and profile.communicators[-1] == "distributed"
    assert profile.description and profile.verified and not profile.strict
    assert load_profile(shipped_profiles()[name]) == profile, "by path and by name are the same"


@pytest.mark.parametrize("name", shipped_profiles())
def test_every_device_number_has_its_source_beside_it(name):
    text = shipped_profiles()[name].read_text().split("\nhardware:")
    numbers = re.findall(r"^  \w+:.*$", text[1], re.MULTILINE) if len(text) == 2 else []
    assert [line for line in numbers if not re.search(r"# \S", line)] == []


def test_the_numbers_that_planning_leans_on():
    v100, h200, ascend = (load_profile(name).hardware for name in ("v100", "h200", "ascend910b"))
    assert (v100.units, v100.matrix_shape, v100.shared_memory_bytes, v100.bf16_tflops) == (80, (8, 8, 4), 96 * 1024, 0)
    assert v100.units * 512 * 2 * v100.clock_ghz / 1e3 == pytest.approx(v100.fp16_tflops, rel=0.01)
    assert (h200.units, h200.memory_gbps, h200.shared_memory_bytes) == (132, 4800, 227 * 1024), "units inherited from h100"
    assert ascend.units * 2 * math.prod(ascend.matrix_shape) * ascend.clock_ghz / 1e3 == pytest.approx(ascend.fp16_tflops, rel=0.01)
    assert ascend.alignments == Alignments(ub_bytes=32, l1_bytes=32, l0a_bytes=512, l0b_bytes=512, l0c_bytes=64)


def test_where_inherited_values_come_from():
    rows = {key: (value, origin) for key, value, origin in load_profile("h200").resolved()}
    assert rows["hardware.units"][0] == 132 and re.fullmatch(r"h100\.yaml:\d+", rows["hardware.units"][1])
    assert rows["hardware.memory_gib"][0] == 141 and re.fullmatch(r"h200\.yaml:\d+", rows["hardware.memory_gib"][1])
    assert rows["threads_per_rank"] == (0, "built-in")
    line = int(rows["hardware.memory_gib"][1].split(":")[1])
    assert "memory_gib: 141" in shipped_profiles()["h200"].read_text().splitlines()[line - 1]


# which device gets which

SECTIONS = profile_module._detect_sections()


@pytest.mark.parametrize("kind, name, capability, expected", [
    ("cuda", "Tesla V100-SXM2-32GB", "7.0", "v100"),
    ("cuda", "Tesla V100S-PCIE-32GB", "7.0", "v100"),
    ("cuda", "NVIDIA TITAN V", "7.0", "cuda"),                   # right capability, other memory and no NVLink
    ("cuda", "NVIDIA H100 80GB HBM3", "9.0", "h100"),
    ("cuda", "NVIDIA H200", "9.0", "h200"),
    ("cuda", "NVIDIA GH200 480GB", "9.0", "cuda"),               # has H200 inside its name and is none
    ("cuda", "NVIDIA H20", "9.0", "cuda"),
    ("cuda", "NVIDIA A100-SXM4-80GB", "8.0", "a100"),
    ("cuda", "NVIDIA GeForce RTX 4090", "8.9", "rtx4090"),
    ("cuda", "AMD Instinct MI300X", "9.4", "mi300x"),
    ("cuda", "AMD Instinct MI250X", "9.0", "cuda"),              # ROCm says 9.0 for gfx90a
    ("npu", "Ascend910B2", None, "ascend910b"),
    ("npu", "Ascend910B4-1", None, "ascend910b"),
    ("npu", "Ascend910B", None, "ascend910a"),                   # without a digit it is a first-generation chip
    ("npu", "Ascend910PremiumA", None, "ascend910a"),
])
def test_a_device_is_known_by_name_and_capability(kind, name, capability, expected):
    assert choose(kind, name, capability, SECTIONS) == expected


def test_an_npu_that_no_file_names_says_what_to_do():
    with pytest.raises(ProfileError, match=r"no shipped profile names the npu device 'Ascend310P3' \(there are ascend910a, ascend910b\);"):
        choose("npu", "Ascend310P3", None, SECTIONS)


def test_detect_on_this_machine():
    assert detect("cpu") == detect(torch.device("cpu")) == "cpu"
    assert load_profile(None, device="cpu") == load_profile("cpu")
    best = detect()
    assert load_profile(best).device == ("cuda" if torch.cuda.is_available() else "npu" if "torch_npu" in sys.modules else "cpu")
    assert re.search(r", \d+ cores$", device_name(torch.device("cpu")))


def test_a_device_that_is_not_there_is_refused():
    index = torch.cuda.device_count()
    with pytest.raises(ProfileError, match=f"device 'cuda:{index}' asked for, but torch sees {index} cuda devices on this machine"):
        present_device(f"cuda:{index}")
    with pytest.raises(ProfileError, match="no profiles for device type 'mps', expected cpu, cuda or npu"):
        detect("mps")
    with pytest.raises(ProfileError, match="device 'gpu' is not one that torch knows, expected cpu, cuda or npu"):
        detect("gpu")
    if "torch_npu" not in sys.modules:
        with pytest.raises(ProfileError, match="device 'npu' asked for, but torch_npu is not loaded; import torch_npu first"):
            present_device("npu")


# the dataclasses check themselves

@pytest.mark.parametrize("build, message", [
    (lambda: DeviceProfile(name="x", device="tpu"), "device is 'tpu' (a string), expected one of cpu, cuda, npu"),
    (lambda: DeviceProfile(name="a b", device="cpu"), "name is 'a b' (a string), expected a string (letters, digits, _ . and -)"),
    (lambda: DeviceProfile(name="x", device="cpu", kv_block_size=0), "kv_block_size is 0, expected an integer >= 1"),
    (lambda: DeviceProfile(name="x", device="cpu", kv_block_size=True), "kv_block_size is true, expected an integer >= 1"),
    (lambda: DeviceProfile(name="x", device="cpu", strict=1), "strict is 1, expected true or false"),
    (lambda: DeviceProfile(name="x", device="cpu", timeout_s=math.nan), "timeout_s is nan, expected a number > 0"),
    (lambda: DeviceProfile(name="x", device="cpu", timeout_s=10**400), "timeout_s is"),
    (lambda: DeviceProfile(name="x", device="cpu", backends="sdpa"), "backends is 'sdpa' (a string), expected a list of strings"),
    (lambda: DeviceProfile(name="x", device="cpu", backends=()), "backends is [], expected at least one"),
    (lambda: DeviceProfile(name="x", device="cpu", backends=("sdpa", "sdpa")), "backends names sdpa twice"),
    (lambda: DeviceProfile(name="x", device="cpu", backends=("reference",)), "backends names reference, which is never chosen"),
    (lambda: DeviceProfile(name="x", device="cpu", communicators=()), "communicators is [], expected at least one"),
    (lambda: DeviceProfile(name="x", device="cpu", detect=Detect(cuda_capability="7.0")), "detect.cuda_capability is stated for device"),
    (lambda: DeviceProfile(name="x", device="cpu", hardware={}), "hardware is {} (a mapping), expected a Hardware"),
    (lambda: Detect(cuda_capability="70"), "cuda_capability is '70' (a string), expected a string (quoted, as in '7.0') or null"),
    (lambda: Hardware(matrix_shape=(16, 16)), "matrix_shape has 2 items, expected a list of 3 integers >= 1 or null"),
    (lambda: Hardware(units=0), "units is 0, expected an integer >= 1 or null"),
    (lambda: Hardware(ub_reserved_bytes=1), "hardware.ub_reserved_bytes is 1, expected less than ub_bytes, which is not stated"),
    (lambda: Hardware(ub_bytes=8, ub_reserved_bytes=8), "hardware.ub_reserved_bytes is 8, expected less than ub_bytes (8)"),
])
def test_a_wrong_value_is_refused_in_python_too(build, message):
    with pytest.raises(ProfileError) as raised:
        build()
    assert str(raised.value).startswith(message)


def test_a_profile_is_a_value():
    one = DeviceProfile(name="x", device="cpu", backends=["sdpa"], timeout_s=5)
    other = DeviceProfile(name="x", device="cpu", timeout_s=5.0, origins={"timeout_s": "--set"})
    assert one == other and hash(one) == hash(other), "lists become tuples, integers numbers, and origins do not count"
    assert one.backends == ("sdpa",) and type(one.timeout_s) is float
    assert dataclasses.replace(one, kv_block_size=8) != one
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.strict = True
    with pytest.raises(TypeError):
        other.origins["timeout_s"] = "elsewhere"
    rows = {key: origin for key, _, origin in one.resolved()}
    assert rows["timeout_s"] == "Python" and rows["strict"] == "built-in"


def test_a_profile_and_its_error_cross_a_process_boundary():
    profile = load_profile("v100", sets=["strict=true"])
    copy = pickle.loads(pickle.dumps(profile))
    assert copy == profile and dict(copy.origins) == dict(profile.origins) and copy.origins["strict"] == "--set"
    error = pickle.loads(pickle.dumps(ProfileError("x.yaml:1: a", key="a")))
    assert (str(error), error.key) == ("x.yaml:1: a", "a")


# round trip

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NAMES = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,8}", fullmatch=True).filter(lambda name: name != "reference")


def values_of(leaf):
    if leaf.choices:
        one = st.sampled_from(leaf.choices)
    elif leaf.kind is str:
        one = st.from_regex(leaf.pattern, fullmatch=True).filter(lambda t: t != "reference") if leaf.pattern else TEXT
    elif leaf.kind is float:
        one = st.floats(min_value=max(leaf.minimum or 0, leaf.above or 0), max_value=leaf.maximum, exclude_min=leaf.above is not None,
                        allow_infinity=False)
    else:
        one = st.booleans() if leaf.kind is bool else st.integers(int(leaf.minimum), leaf.maximum or 2**70)
    if leaf.many:
        one = st.lists(one, min_size=leaf.length or 0, max_size=leaf.length or 4, unique=leaf.kind is str).map(tuple)
    return one | st.none() if leaf.optional else one


@st.composite
def instances(draw, cls, prefix=""):
    given_values = {name: draw(instances(nested, prefix + name + ".")) for name, nested in sections(cls).items()}
    for name, leaf in leaves(cls).items():
        if "." not in name and (prefix or name not in ("backends", "awaits", "communicators")):
            given_values[name] = draw(values_of(leaf))
    if cls is Overlap:                                       # a point of a curve stands there once
        once = {text.rpartition(" ")[0]: text for text in given_values["measured"]}
        given_values["measured"] = tuple(once.values())
    if cls is Hardware and given_values["ub_reserved_bytes"] is not None:
        given_values["ub_bytes"] = given_values["ub_reserved_bytes"] + draw(st.integers(1, 1000))
    if cls is DeviceProfile:
        names = draw(st.lists(NAMES, min_size=1, max_size=5, unique=True))
        cut = draw(st.integers(1, len(names)))
        given_values |= {"backends": tuple(names[:cut]), "awaits": tuple(names[cut:]), "communicators": tuple(names)}
        if given_values["device"] != "cuda":
            given_values["detect"] = dataclasses.replace(given_values["detect"], cuda_capability=None)
        if given_values["algorithm"] in ("native", "ring", "tree"):
            given_values["codec"] = draw(st.sampled_from(("none", "auto")))
        given_values |= {name: 4096 * (1 + given_values[name] // 4096) for name in WHOLE_PAGES}
    return cls(**given_values)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(profile=instances(DeviceProfile))
def test_what_to_dict_gives_loads_as_an_equal_profile(tmp_path_factory, profile):
    path = tmp_path_factory.mktemp("round") / "any.yaml"
    path.write_text(yaml.safe_dump(profile.to_dict()), encoding="utf-8")
    loaded = load_profile(path)
    assert loaded == profile
    assert loaded.to_dict() == profile.to_dict()
    assert {origin.rpartition(":")[0] for _, _, origin in loaded.resolved()} == {str(path)}, "every value is stated in the file"


# the floor

@pytest.mark.parametrize("module", ["profile", "profile_fields", "profile_yaml", "profile_detect", "profile_schema", "profile_overlap",
                                    "hardware", "overlay", "environment"])
def test_profiles_stand_on_the_floor(module):
    siblings = {"profile", "profile_fields", "profile_yaml", "profile_detect", "profile_overlap", "hardware", "overlay", "quantity"}
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    names = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)] + [
        alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
    assert names
    for name in names:
        package, _, rest = name.partition(".")
        assert package in {*sys.stdlib_module_names, "torch", "yaml"} or (package == "hetero_attn" and rest in siblings), name


def test_who_lists_a_backend_awaits_it_no_longer():
    assert load_profile("cpu", sets=["awaits=[chip]"]).awaits == ("chip",)
    profile = load_profile("cpu", sets=["awaits=[chip]", "backends=[chip, sdpa]"])
    assert profile.backends == ("chip", "sdpa") and profile.awaits == ()
