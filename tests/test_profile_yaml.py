"""Reading profile YAML: what is refused, and the exact words, file and line of each refusal."""

import pytest

from hetero_attn.profile import DeviceProfile, ProfileError, load_profile
from hetero_attn.profile_fields import leaves
from hetero_attn.profile_yaml import parse_set

HEAD = "name: mine\ndevice: cpu\n"


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """Files are named relative to the working folder, so that the errors read as they would for a user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HETERO_ATTN_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.delenv("HETERO_ATTN_PROFILE", raising=False)
    monkeypatch.delenv("HETERO_ATTN_SET", raising=False)
    return tmp_path


def refusal(text: str | bytes, name: str = "mine.yaml") -> str:
    with open(name, "wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ProfileError) as raised:
        load_profile(name)
    message = str(raised.value)
    assert "\n" not in message, "an error is one line"
    return message


@pytest.mark.parametrize("text, message", [
    # unknown keys: the full path, the nearest name beside it, else where that name stands
    ("hardware:\n  memry_gib: 3\n", "mine.yaml:4: unknown key hardware.memry_gib; did you mean memory_gib?"),
    ("backend: [sdpa]\n", "mine.yaml:3: unknown key backend; did you mean backends?"),
    ("hardware:\n  alignments:\n    ub_byte: 3\n", "mine.yaml:5: unknown key hardware.alignments.ub_byte; did you mean ub_bytes?"),
    ("memory_gib: 3\n", "mine.yaml:3: unknown key memory_gib; did you mean hardware.memory_gib?"),
    ("extend: cpu\n", "mine.yaml:3: unknown key extend; did you mean extends?"),
    ("hardware.units: 3\n", "mine.yaml:3: hardware.units is written with a dot, expected it nested: `hardware:` and under it `units: ...`"),
    ("origins: {}\n", "mine.yaml:3: unknown key origins; known keys: name, device, description, verified, "),
    ("detect:\n  zzz: 1\n", "mine.yaml:4: unknown key detect.zzz; known here: device_name, cuda_capability"),
    # keys
    ("strict: true\n\nstrict: false\n", "mine.yaml:5: key strict stands twice, first on line 3; keep one"),
    ("hardware:\n  units: 1\n  units: 1\n", "mine.yaml:5: key hardware.units stands twice, first on line 4; keep one"),
    ("? [a]\n: 1\n", "mine.yaml:3: a key of the file is a list or a mapping, expected a name"),
    # kinds
    ("kv_block_size: many\n", "mine.yaml:3: kv_block_size is 'many' (a string), expected an integer >= 1"),
    ("kv_block_size: 16.0\n", "mine.yaml:3: kv_block_size is 16.0, expected an integer >= 1"),
    ("kv_block_size: 0\n", "mine.yaml:3: kv_block_size is 0, expected an integer >= 1"),
    ("kv_block_size:\n", "mine.yaml:3: kv_block_size is null, expected an integer >= 1"),
    ("kv_block_size: [16]\n", "mine.yaml:3: kv_block_size is [16] (a list), expected an integer >= 1"),
    ("strict: 1\n", "mine.yaml:3: strict is 1, expected true or false"),
    ("timeout_s: yes\n", "mine.yaml:3: timeout_s is true, expected a number > 0"),
    ("timeout_s: .inf\n", "mine.yaml:3: timeout_s is inf, expected a number > 0"),
    ("verified: 2026-11-21\n", "mine.yaml:3: verified is '2026-11-21' (a date; quote it to make it a string), expected a string"),
    ("detect:\n  cuda_capability: 7.0\n",
     "mine.yaml:4: detect.cuda_capability is 7.0, expected a string (quoted, as in '7.0') or null"),
    ("backends: sdpa\n", "mine.yaml:3: backends is 'sdpa' (a string), expected a list of strings (lower-case letters, digits, _ and -)"),
    ("backends: [3]\n", "mine.yaml:3: backends holds 3, expected a list of strings (lower-case letters, digits, _ and -)"),
    ("backends: [[sdpa]]\n",
     "mine.yaml:3: backends holds a nested list or mapping, expected a list of strings (lower-case letters, digits, _ and -)"),
    ("backends: {sdpa: 1}\n", "mine.yaml:3: backends is a mapping, expected a list of strings (lower-case letters, digits, _ and -)"),
    ("hardware:\n  matrix_shape: [8, 8]\n", "mine.yaml:4: hardware.matrix_shape has 2 items, expected a list of 3 integers >= 1 or null"),
    ("vocabulary: shard\n", "mine.yaml:3: vocabulary is 'shard' (a string), expected one of sharded, master; did you mean sharded?"),
    ("hardware: 3\n", "mine.yaml:3: hardware is a section, expected keys under it: units, "),
    ("description: !!python/object:os.system {}\n", "mine.yaml:3: description is a mapping, expected a string"),
    ("description: !secret abc\n", "mine.yaml:3: description is tagged !secret, expected a string"),
    ("kv_block_size: !!int abc\n", "mine.yaml:3: kv_block_size is 'abc', expected an integer >= 1"),
    # one value beside another
    ("backends: []\n", "mine.yaml:3: backends is [], expected at least one; every device runs [sdpa]"),
    ("hardware:\n  ub_bytes: 8\n  ub_reserved_bytes: 9\n",
     "mine.yaml:5: hardware.ub_reserved_bytes is 9, expected less than ub_bytes (8)"),
])
def test_a_fault_is_named_with_file_line_and_key(text, message):
    found = refusal(HEAD + text)
    assert found == message if not message.endswith(" ") else found.startswith(message)


@pytest.mark.parametrize("text, message", [
    ("", "mine.yaml: the file is empty, expected `key: value` lines"),
    ("- a\n", "mine.yaml: the file is a list, expected `key: value` lines"),
    ("cpu\n", "mine.yaml: the file is a single value, expected `key: value` lines"),
    ("name: mine\n", "mine.yaml: device is missing, expected one of cpu, cuda, npu; or say `extends: PROFILE`"),
    (b"name: \xff\n", "mine.yaml: not UTF-8 text (byte 6), expected a YAML file"),
    ("name: \x07\n", "mine.yaml: not valid YAML: unacceptable character #x0007: special characters are not allowed"),
    ("name: mine\ndevice: [cpu\n",
     "mine.yaml:3: not valid YAML: while parsing a flow sequence expected ',' or ']', but got '<stream end>'"),
    ("name: mine\n\tdevice: cpu\n", "mine.yaml:2: not valid YAML: "),
    ("a: 1\n---\nb: 2\n", "mine.yaml:2: not valid YAML: expected a single document in the stream but found another document"),
    ("[" * 5000, "mine.yaml: not valid YAML: nested too deeply"),
])
def test_a_file_that_is_no_profile(text, message):
    assert refusal(text).startswith(message)


def test_an_anchor_that_holds_itself_ends():
    assert refusal(HEAD + "hardware: &h\n  alignments: *h\n") == (
        "mine.yaml:4: unknown key hardware.alignments.alignments; known here: ub_bytes, l1_bytes, l0a_bytes, l0b_bytes, l0c_bytes")


# extends

def test_a_file_states_only_what_differs(own_folder):
    (own_folder / "mine.yaml").write_text("extends: v100\nhardware:\n  memory_gib: 16\n")
    (own_folder / "folder").mkdir()
    (own_folder / "folder" / "yours.yaml").write_text("extends: ../mine.yaml\nbackends: [triton, sdpa]\n")
    base, mine, yours = load_profile("v100"), load_profile("mine.yaml"), load_profile("folder/yours.yaml")
    assert mine.hardware.memory_gib == 16 and mine.hardware.units == base.hardware.units == 80 and mine.dtype == "float16"
    assert mine.name == "mine" and mine.verified == "none" and mine.detect.device_name == (), "another device, known by nothing yet"
    assert yours.hardware.memory_gib == 16 and yours.backends == ("triton", "sdpa"), "a list replaces a list"
    assert yours.origins["hardware.units"].startswith("v100.yaml:") and yours.origins["backends"] == "folder/yours.yaml:2"
    assert yours.origins["hardware.memory_gib"] == "folder/../mine.yaml:3"
    assert yours.origins["name"] == "folder/yours.yaml (its name)" and yours.name == "yours"


def test_extends_that_leads_nowhere(own_folder):
    assert refusal("extends: mine.yaml\n") == "mine.yaml:1: extends goes in a circle: mine.yaml -> mine.yaml"
    (own_folder / "b.yaml").write_text("device: cpu\nextends: mine.yaml\n")
    assert refusal("extends: b.yaml\n") == "b.yaml:2: extends goes in a circle: mine.yaml -> b.yaml -> mine.yaml"
    message = "mine.yaml:1: extends: unknown profile 'v10'; did you mean v100? shipped are a100, ascend910a, "
    assert refusal("extends: v10\n").startswith(message)
    assert refusal("extends: gone.yaml\n").startswith("mine.yaml:1: extends: profile file gone.yaml does not exist")
    assert refusal("extends: [cpu]\n") == "mine.yaml:1: extends is ['cpu'], expected the name of a profile or the path of one"


# names and paths

def test_an_unknown_name_lists_the_shipped_ones():
    with pytest.raises(ProfileError) as raised:
        load_profile("v10")
    assert str(raised.value) == ("unknown profile 'v10'; did you mean v100? shipped are a100, ascend910a, ascend910b, cpu, cuda, edge, "
                                 "h100, h200, mi300x, rtx4090, v100; a profile of your own is given as a path ending in .yaml")
    with pytest.raises(ProfileError, match=r"^unknown profile 'zzzz'; shipped are a100, ascend910a"):
        load_profile("zzzz")


def test_a_path_is_taken_wherever_a_name_is(own_folder, monkeypatch):
    path = own_folder / "mine.yaml"
    path.write_text("device: cpu\nkv_block_size: 7\n")
    monkeypatch.setenv("HETERO_ATTN_PROFILE", str(path))
    for profile in (load_profile(path), load_profile(str(path)), load_profile("./mine.yaml"), load_profile()):
        assert (profile.name, profile.kv_block_size) == ("mine", 7)
    with pytest.raises(ProfileError, match=r"^profile file gone\.yaml does not exist; shipped profiles are a100"):
        load_profile("gone.yaml")
    monkeypatch.setenv("HETERO_ATTN_PROFILE", "nobody")
    with pytest.raises(ProfileError, match=r"^unknown profile 'nobody'"):
        load_profile()
    assert load_profile("cpu").name == "cpu", "a name that is given stands above the variable"


# --set

@pytest.mark.parametrize("assignment, value", [
    ("hardware.memory_gib=16", 16.0),
    ("hardware.memory_gib = 16.5", 16.5),
    ("hardware.memory_gib=null", None),
    ("backends=[cpu, sdpa]", ("cpu", "sdpa")),
    ("hardware.matrix_shape=[16, 8, 16]", (16, 8, 16)),
    ("strict=true", True),
    ("description=a=b", "a=b"),
    ("detect.cuda_capability='9.0'", "9.0"),
])
def test_set_takes_scalars_and_lists(assignment, value):
    path, entry = parse_set(assignment, leaves(DeviceProfile))
    assert path == assignment.partition("=")[0].strip()
    assert entry == (value, "--set") and type(entry.value) is type(value)


@pytest.mark.parametrize("assignment, message", [
    ("hardware.memry_gib=3", "--set hardware.memry_gib=3: unknown key hardware.memry_gib; did you mean memory_gib?"),
    ("memory_gib=3", "--set memory_gib=3: unknown key memory_gib; did you mean hardware.memory_gib?"),
    ("strict", "--set strict: expected key.path=value, as in --set kv_block_size=32"),
    ("=3", "--set =3: expected key.path=value, as in --set kv_block_size=32"),
    ("strict=", "--set strict=: strict is null, expected true or false"),
    ("strict=1", "--set strict=1: strict is 1, expected true or false"),
    ("detect=3", "--set detect=3: detect is a section, expected one of its keys: device_name, cuda_capability"),
    ("backends={a: 1}", "--set backends={a: 1}: backends is a mapping, expected a list of strings (lower-case letters, digits, _ and -)"),
    ("backends=[a", "--set backends=[a:1: not valid YAML: while parsing a flow sequence expected ',' or ']', but got '<stream end>'"),
    ("backends=[]", "--set: backends is [], expected at least one; every device runs [sdpa]"),
])
def test_a_wrong_set_is_refused(assignment, message):
    with pytest.raises(ProfileError) as raised:
        load_profile("cpu", sets=[assignment])
    assert str(raised.value) == message
