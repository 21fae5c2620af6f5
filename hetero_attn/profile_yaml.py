"""Strict reading of profile YAML: every value keeps the file and line it stands on.

yaml.safe_load forgets the lines and lets the last of two equal keys win, so the text is composed to nodes with SafeLoader (which builds no
Python objects) and walked here against the fields the dataclasses declare. Whatever they do not declare is refused, with the full key path
and the nearest known name, since a misspelt key that is skipped in silence is a setting that is not in force.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hetero_attn.profile_fields import Leaf, ProfileError

MAPPING_TAG = "tag:yaml.org,2002:map"
SEQUENCE_TAG = "tag:yaml.org,2002:seq"
SCALAR_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null"))
TAG_WORDS = {"tag:yaml.org,2002:timestamp": "a date; quote it to make it a string", "tag:yaml.org,2002:binary": "binary data",
             "tag:yaml.org,2002:value": "the YAML key ="}


class Entry(NamedTuple):
    """One value as it was written, checked against its field, and where that was: 'v100.yaml:12', '--set', ..."""

    value: Any
    origin: str


def read_text(path: Path, label: str) -> str:
    """The file's text. Raises ProfileError naming the file for anything the system or the encoding objects to."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ProfileError(f"{label}: not UTF-8 text (byte {error.start}), expected a YAML file") from None
    except OSError as error:
        raise ProfileError(f"{label}: cannot be read: {error.strerror or error}") from None


def compose(text: str, label: str) -> yaml.MappingNode:
    """The one mapping a document must be. Raises ProfileError with the line for text that is not YAML, or is something else."""
    node = _compose_node(text, label)
    if not isinstance(node, yaml.MappingNode):
        found = "empty" if node is None else "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise ProfileError(f"{label}: the file is {found}, expected `key: value` lines")
    return node


def _compose_node(text: str, label: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ProfileError(f"{label}{line}: not valid YAML: {' '.join(part for part in (error.context, error.problem) if part)}") from None
    except yaml.YAMLError as error:                        # a character that YAML forbids has a position, but no line
        raise ProfileError(f"{label}: not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ProfileError(f"{label}: not valid YAML: nested too deeply") from None


def line_of(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def pairs(node: yaml.MappingNode, label: str, prefix: str = "") -> list[tuple[str, int, yaml.Node]]:
    """(key, line, value node) of a mapping in file order. Raises ProfileError for a key that is not a string or stands there twice."""
    seen: dict[str, int] = {}
    found = []
    for key_node, value_node in node.value:
        line = line_of(key_node)
        if not isinstance(key_node, yaml.ScalarNode):
            raise ProfileError(f"{label}:{line}: a key of {prefix.rstrip('.') or 'the file'} is a list or a mapping, expected a name")
        key = key_node.value
        if key in seen:
            raise ProfileError(f"{label}:{line}: key {prefix}{key} stands twice, first on line {seen[key]}; keep one", key=prefix + key)
        seen[key] = line
        found.append((key, line, value_node))
    return found


def plain(node: yaml.Node, where: str, path: str, expected: str) -> Any:
    """The Python value of a scalar, or of a list of scalars. `where` opens the error: 'v100.yaml:7'."""
    if isinstance(node, yaml.SequenceNode) and node.tag == SEQUENCE_TAG:
        for item in node.value:
            if not isinstance(item, yaml.ScalarNode):
                raise ProfileError(f"{where}: {path} holds a nested list or mapping, expected {expected}", key=path)
        return [plain(item, where, path, expected) for item in node.value]
    if isinstance(node, yaml.ScalarNode) and node.tag in SCALAR_TAGS:
        try:
            return yaml.SafeLoader("").construct_object(node)
        except (ValueError, KeyError, yaml.YAMLError):     # !!int abc, !!bool 7: a tag its own text contradicts
            pass
    if isinstance(node, yaml.MappingNode):
        found = "a mapping"
    elif node.tag in TAG_WORDS:
        found = f"{node.value!r} ({TAG_WORDS[node.tag]})"
    elif node.tag in SCALAR_TAGS:
        found = repr(node.value if len(node.value) <= 60 else node.value[:57] + "...")
    else:
        found = f"tagged {node.tag}"
    raise ProfileError(f"{where}: {path} is {found}, expected {expected}", key=path)


def accept(leaf: Leaf, value: Any, where: str) -> Any:
    """The value as its field stores it. Raises ProfileError that opens with `where` and names the full key path."""
    try:
        return leaf.accept(value)
    except ValueError as error:
        raise ProfileError(f"{where}: {leaf.path} {error}{_nearest_choice(leaf, value)}", key=leaf.path) from None


def _nearest_choice(leaf: Leaf, value: Any) -> str:
    close = difflib.get_close_matches(value, leaf.choices, n=1) if isinstance(value, str) else []
    return f"; did you mean {close[0]}?" if close else ""


def unknown_key(path: str, known: Iterable[str]) -> str:
    """'unknown key hardware.memry_gib; did you mean memory_gib?': the same name elsewhere, else the nearest beside it, else elsewhere."""
    known = list(known)
    prefix, _, name = path.rpartition(".")
    prefix = prefix + "." if prefix else ""
    beside = list(dict.fromkeys(k[len(prefix):].split(".")[0] for k in known if k.startswith(prefix)))
    close = difflib.get_close_matches(name, beside, n=1)
    elsewhere = exact = [k for k in known if k.rpartition(".")[2] == name]
    if not exact:
        nearest = difflib.get_close_matches(name, [k.rpartition(".")[2] for k in known], n=1, cutoff=0.8)
        elsewhere = [k for k in known if nearest and k.rpartition(".")[2] == nearest[0]]
    if any(k.startswith(path + ".") for k in known):
        return f"{path} is a section, expected one of its keys: {_under(path, known)}"
    if close and not exact:
        return f"unknown key {path}; did you mean {close[0]}?"
    if elsewhere:
        return f"unknown key {path}; did you mean {elsewhere[0]}?"
    return f"unknown key {path}; known {'here' if prefix else 'keys'}: {', '.join(beside or sorted(known))}"


def entries(node: yaml.MappingNode, leaves: Mapping[str, Leaf], label: str, prefix: str = "",
            also: tuple[str, ...] = ()) -> dict[str, Entry]:
    """Key path -> Entry for all values under a mapping. Keys in `also` are left to the caller. Raises ProfileError on the first fault."""
    found: dict[str, Entry] = {}
    for key, line, value in pairs(node, label, prefix):
        path, where = prefix + key, f"{label}:{line}"
        if key in also:
            continue
        if path in leaves and "." in key:
            above, _, name = key.rpartition(".")
            nested = f"`{above}:` and under it `{name}: ...`"
            raise ProfileError(f"{where}: {path} is written with a dot, expected it nested: {nested}", key=path)
        if path in leaves:
            leaf = leaves[path]
            found[path] = Entry(accept(leaf, plain(value, where, path, leaf.expected()), where), where)
        elif "." not in key and any(known.startswith(path + ".") for known in leaves):
            if not isinstance(value, yaml.MappingNode):
                raise ProfileError(f"{where}: {path} is a section, expected keys under it: {_under(path, leaves)}", key=path)
            found.update(entries(value, leaves, label, path + "."))
        else:
            raise ProfileError(f"{where}: {unknown_key(path, [*leaves, *(prefix + name for name in also)])}", key=path)
    return found


def _under(path: str, leaves: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(known[len(path) + 1:].split(".")[0] for known in leaves if known.startswith(path + ".")))


def parse_set(assignment: str, leaves: Mapping[str, Leaf], source: str = "--set") -> tuple[str, Entry]:
    """'hardware.memory_gib=16' or 'backends=[cpu, sdpa]' -> (key path, Entry); the right side is a YAML scalar or list.
    Raises ProfileError that opens with the assignment."""
    where = f"{source} {assignment}"
    path, equals, text = assignment.partition("=")
    path = path.strip()
    if not equals or not path:
        raise ProfileError(f"{where}: expected key.path=value, as in {source} kv_block_size=32")
    if path not in leaves:
        raise ProfileError(f"{where}: {unknown_key(path, leaves)}", key=path)
    leaf = leaves[path]
    node = _compose_node(text, where)
    value = None if node is None else plain(node, where, path, leaf.expected())
    return path, Entry(accept(leaf, value, where), source)
