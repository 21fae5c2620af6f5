"""The JSON Schema: the committed one is the generated one, and it agrees with the reader on the shipped files and on faults."""

import json
import subprocess
import sys

import pytest
import yaml

from hetero_attn.profile import ProfileError, load_profile, shipped_profiles
from hetero_attn.profile_detect import configs_directory
from hetero_attn.profile_schema import FILE_NAME, main, profile_schema, schema_text


def validator():
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(profile_schema())
    return jsonschema.Draft202012Validator(profile_schema())


def test_the_committed_schema_is_the_generated_one():
    committed = (configs_directory() / FILE_NAME).read_text(encoding="utf-8")
    assert committed == schema_text(), "run python -m hetero_attn.profile_schema --write"


def test_the_command_prints_and_writes_it(monkeypatch, tmp_path):
    run = subprocess.run([sys.executable, "-m", "hetero_attn.profile_schema"], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout == schema_text()
    monkeypatch.setattr("hetero_attn.profile_schema.configs_directory", lambda: tmp_path)
    assert main(["--write"]) == 0 and (tmp_path / FILE_NAME).read_text(encoding="utf-8") == schema_text()


def test_every_key_is_described():
    def undescribed(schema, path=""):
        for name, inner in schema.get("properties", {}).items():
            if not inner.get("description"):
                yield path + name
            yield from undescribed(inner, f"{path}{name}.")
    assert list(undescribed(profile_schema())) == []
    assert json.loads(schema_text())["properties"]["hardware"]["properties"]["memory_gib"]["exclusiveMinimum"] == 0


@pytest.mark.parametrize("name", shipped_profiles())
def test_a_shipped_file_is_valid(name):
    assert list(validator().iter_errors(yaml.safe_load(shipped_profiles()[name].read_text()))) == []
    assert list(validator().iter_errors(load_profile(name).to_dict())) == []


@pytest.mark.parametrize("text", [
    "name: x", "device: tpu", "device: cpu\nhardware: {memry_gib: 3}", "device: cpu\nkv_block_size: 0", "device: cpu\nkv_block_size: true",
    "device: cpu\nbackends: sdpa", "device: cpu\nbackends: [sdpa, sdpa]", "device: cpu\nbackends: [Sdpa]", "device: cpu\ntimeout_s: 0",
    "device: cpu\nhardware: {matrix_shape: [1, 2]}", "device: cuda\ndetect: {cuda_capability: 7.0}", "device: cpu\nstrict: 1",
    "device: cpu\nkv_block_size: null", "device: cpu\nhardware: 3", "extends: [cpu]", "device: cpu\norigins: {}",
])
def test_what_the_reader_refuses_the_schema_refuses(text, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ProfileError):
        load_profile(tmp_path / "x.yaml")
    assert list(validator().iter_errors(yaml.safe_load(text)))
