"""The user's tuned overlay: what `tune` and `calibrate` measured on one device, laid over its profile.

Measured values go into the user's config folder, so that the shipped files keep their sourced comments. There is one YAML file per profile,
device, world size and model, since a tile that is best for one is not for another. A file states whom it is for and is believed only if
that is what was asked: a copied or renamed file is refused. Writing keeps the values that are there and are not the writer's, and replaces
the file in one step, so a crash leaves the old one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from hetero_attn.profile_fields import Leaf, ProfileError, check_fields, setting
from hetero_attn.profile_fields import leaves as leaves_of
from hetero_attn.profile_yaml import Entry, accept, compose, entries, pairs, plain, read_text, unknown_key

HEADER = "# Values measured on this machine, laid over the profile named below. Delete the file to go back to the profile's own.\n"
IDENTITY = ("name", "device", "detect")          # what a profile is, an overlay cannot change


@dataclass(frozen=True)
class OverlayKey:
    """Whom an overlay is for. None for world_size or model means any."""

    profile: str = setting("Name of the profile it lies over")
    device: str = setting("The device's own name, as its driver gives it")
    world_size: int | None = setting("Number of ranks it was measured with; null = any", default=None, minimum=1)
    model: str | None = setting("Model it was measured with; null = any", default=None)

    def __post_init__(self):
        check_fields(self)

    def path(self) -> Path:
        """The file of this key: readable parts, and a digest of the whole key since the parts drop characters."""
        parts = [self.profile, self.device, f"tp{self.world_size}" if self.world_size else "", self.model or ""]
        words = [re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-")[:40] for part in parts]
        digest = hashlib.sha256(repr((self.profile, self.device, self.world_size, self.model)).encode()).hexdigest()[:8]
        return config_directory() / "overlays" / ("_".join(word for word in words if word) + f"_{digest}.yaml")

    def generalisations(self) -> list[OverlayKey]:
        """The keys whose files apply to this one, the most general first, so that a later one wins."""
        sizes, models = dict.fromkeys((None, self.world_size)), dict.fromkeys((None, self.model))
        return [OverlayKey(self.profile, self.device, size, model) for size in sizes for model in models]


def config_directory() -> Path:
    """$HETERO_ATTN_CONFIG_DIR, else $XDG_CONFIG_HOME/hetero_attn, else ~/.config/hetero_attn. It need not exist."""
    own = os.environ.get("HETERO_ATTN_CONFIG_DIR")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME")              # by its specification a relative path there is to be ignored
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".config") / "hetero_attn"


def read_overlay(key: OverlayKey, leaves: Mapping[str, Leaf]) -> dict[str, Entry]:
    """Key path -> Entry of the file of exactly this key; {} if there is none. leaves: the profile's fields.

    Raises ProfileError, one line that names file and line and what to do, for a file that is damaged or is for another key."""
    path = key.path()
    if not path.exists():
        return {}
    try:
        return _read(path, key, leaves)[0]
    except ProfileError as error:
        raise ProfileError(f"{error}; repair or delete this overlay", key=error.key) from None


def _read(path: Path, key: OverlayKey, leaves: Mapping[str, Leaf]) -> tuple[dict[str, Entry], dict[str, str]]:
    """The file's values and notes."""
    label = f"overlay {path}"
    root = compose(read_text(path, label), label)
    head = {name: entry.value for name, entry in entries(root, leaves_of(OverlayKey), label, also=("values", "notes")).items()}
    for name, wanted in asdict(key).items():
        if name not in head:
            raise ProfileError(f"{label}: {name} is missing, expected {wanted!r}")
        if head[name] != wanted:
            raise ProfileError(f"{label}: {name} is {head[name]!r}, expected {wanted!r} for a file of this name")
    found: dict[str, Entry] = {}
    notes: dict[str, Entry] = {}
    for name, line, node in pairs(root, label):
        if name in ("values", "notes") and not isinstance(node, yaml.MappingNode):
            raise ProfileError(f"{label}:{line}: {name} is no mapping, expected keys under it")
        if name == "values":
            found = entries(node, leaves, label)
        elif name == "notes":
            for note, note_line, text in pairs(node, label, "notes."):
                where = f"{label}:{note_line}"
                notes[note] = Entry(plain(text, where, f"notes.{note}", "a string"), where)
    for path, value in found.items():
        _refuse_identity(path, value.origin)
    for note, text in notes.items():
        if note not in found or not isinstance(text.value, str):
            raise ProfileError(f"{text.origin}: notes.{note} is {text.value!r}, expected a string on one of the values: {', '.join(found)}")
    return found, {note: text.value for note, text in notes.items()}


def _refuse_identity(path: str, where: str) -> None:
    if path.partition(".")[0] in IDENTITY:
        raise ProfileError(f"{where}: {path} cannot be overlaid, it says what the profile is", key=path)


def write_overlay(key: OverlayKey, values: Mapping[str, Any], leaves: Mapping[str, Leaf], notes: Mapping[str, str] | None = None) -> Path:
    """Lay `values` (key path -> value) into the key's file, keeping the others there, and return its path. A note says how a value was
    measured (machine, date, command); a value written again without a note loses its old one.

    Raises ProfileError for an unknown or ill-typed value and for a damaged file, which stays as it is; OSError if it cannot be written."""
    notes, where = dict(notes or {}), f"overlay of profile {key.profile!r}"
    for path, value in values.items():
        if path not in leaves:
            raise ProfileError(f"{where}: {unknown_key(path, leaves)}", key=path)
        _refuse_identity(path, where)
        accept(leaves[path], value, where)
    for path, text in notes.items():
        if path not in values or not isinstance(text, str):
            raise ProfileError(f"{where}: notes.{path} is {text!r}, expected a string on a value written with it")
    target = key.path()
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent / ".lock"):
        kept, kept_notes = _read_to_keep(target, key, leaves)
        merged = {path: entry.value for path, entry in kept.items()} | dict(values)
        all_notes = {path: text for path, text in kept_notes.items() if path not in values} | notes
        document = {**asdict(key), "values": nested(merged)} | ({"notes": all_notes} if all_notes else {})
        _replace(target, HEADER + yaml.safe_dump(document, sort_keys=False))
    return target


def _read_to_keep(target: Path, key: OverlayKey, leaves: Mapping[str, Leaf]) -> tuple[dict[str, Entry], dict[str, str]]:
    if not target.exists():
        return {}, {}
    try:
        return _read(target, key, leaves)
    except ProfileError as error:
        raise ProfileError(f"{error}; repair or delete this overlay, nothing was written", key=error.key) from None


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{'hardware.units': 2} -> {'hardware': {'units': 2}}, tuples as lists: what YAML and JSON hold."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *above, name = path.split(".")
        inner = tree
        for part in above:
            inner = inner.setdefault(part, {})
        inner[name] = list(value) if isinstance(value, tuple) else value
    return tree


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time: read, merge and replace must not interleave with another rank's."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(target: Path, text: str) -> None:
    """Write beside the target and rename over it: a reader, or a crash, sees the old file or the new one."""
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
