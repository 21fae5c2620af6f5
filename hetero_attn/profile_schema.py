"""The JSON Schema of a profile file, generated from the dataclasses so that an editor completes and checks what the reader accepts.

    python -m hetero_attn.profile_schema            prints it
    python -m hetero_attn.profile_schema --write    writes configs/profile.schema.json (a test holds the committed one to this)
A YAML file may open with `# yaml-language-server: $schema=profile.schema.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from hetero_attn.profile import DeviceProfile
from hetero_attn.profile_detect import configs_directory
from hetero_attn.profile_fields import Leaf, leaves, sections

FILE_NAME = "profile.schema.json"
TYPE_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number"}


def profile_schema() -> dict[str, Any]:
    """The schema (JSON Schema 2020-12) of one profile file: the profile's keys, `extends`, and nothing else."""
    body = _object(DeviceProfile, "")
    body["properties"]["extends"] = {"type": "string", "description": "Profile to start from: a shipped name, or a path beside this file"}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "hetero_attn device profile"}
    return {**head, **body, "anyOf": [{"required": ["device"]}, {"required": ["extends"]}]}


def _object(cls: type, prefix: str) -> dict[str, Any]:
    properties = {}
    for field in dataclasses.fields(cls):
        path = prefix + field.name
        if field.name in sections(cls):
            properties[field.name] = {"description": field.metadata["doc"], **_object(sections(cls)[field.name], path + ".")}
        elif path in leaves(DeviceProfile):
            properties[field.name] = _leaf(leaves(DeviceProfile)[path])
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _leaf(leaf: Leaf) -> dict[str, Any]:
    one: dict[str, Any] = {"type": TYPE_NAMES[leaf.kind]}
    if leaf.choices:
        one["enum"] = list(leaf.choices)
    if leaf.minimum is not None:
        one["minimum"] = leaf.minimum
    if leaf.maximum is not None:
        one["maximum"] = leaf.maximum
    if leaf.above is not None:
        one["exclusiveMinimum"] = leaf.above
    if leaf.pattern is not None:
        one["pattern"] = f"^(?:{leaf.pattern})$"
    if leaf.counted is not None:                           # bounds of the other type do not bind: a pattern says nothing of an integer
        one |= {"type": [one["type"], "integer"], "minimum": 0}
    if leaf.many:
        one = {"type": "array", "items": one}
        if leaf.length is not None:
            one |= {"minItems": leaf.length, "maxItems": leaf.length}
        if leaf.kind is str:
            one["uniqueItems"] = True
    if leaf.optional:
        one["type"] = [*([one["type"]] if isinstance(one["type"], str) else one["type"]), "null"]
    if leaf.default is not dataclasses.MISSING:
        one["default"] = list(leaf.default) if isinstance(leaf.default, tuple) else leaf.default
    return {"description": leaf.doc, **one}


def schema_text() -> str:
    """The schema as it is committed."""
    return json.dumps(profile_schema(), indent=2, ensure_ascii=False) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hetero_attn.profile_schema", description="JSON Schema of a profile file")
    parser.add_argument("--write", action="store_true", help=f"write configs/{FILE_NAME} instead of printing")
    if parser.parse_args(argv).write:
        (configs_directory() / FILE_NAME).write_text(schema_text(), encoding="utf-8")
    else:
        print(schema_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
