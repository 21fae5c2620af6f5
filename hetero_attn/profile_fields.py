"""What one field of a profile may hold, derived from the dataclass that declares it.

The annotation gives the kind (str, bool, int, float, a list of them, a choice, or None for unknown) and `setting()` adds the bounds and
the sentence of documentation. The dataclasses check themselves with it, the YAML reader words its errors with it, and the JSON Schema is
printed from it: one description, so the three cannot disagree. Kinds are strict (no "1" for 1, no 1 for true): a profile is read by
people, and a silent conversion hides the typing error.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

KIND_WORDS = {str: ("a string", "strings"), bool: ("true or false", "booleans"), int: ("an integer", "integers"),
              float: ("a number", "numbers")}


class ProfileError(ValueError):
    """A profile, overlay or setting that cannot be used. One line; `key` is the full key path it is about, where there is one."""

    def __init__(self, message: str, key: str = ""):
        super().__init__(message)
        self.key = key

    def __reduce__(self):                                  # crosses a process boundary with its key
        return type(self), (self.args[0], self.key)


class Origins(Mapping):
    """Read-only mapping key path -> where the value came from. It can be pickled (MappingProxyType cannot), as a profile
    that is sent to a rank must be."""

    def __init__(self, items: Mapping[str, str] = types.MappingProxyType({})):
        self._items = dict(items)

    def __getitem__(self, key: str) -> str:
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return f"Origins({self._items!r})"


def setting(doc: str, *, default: Any = dataclasses.MISSING, minimum: float | None = None, maximum: float | None = None,
            above: float | None = None, pattern: str | None = None, form: str | None = None, counted: str | None = None):
    """A dataclass field with its documentation and bounds: minimum <= value <= maximum, value > above, or the whole string matches
    `pattern` (`form` is that pattern in words; an integer >= 0 stands for the string `counted.format(integer)`). For a list the bounds hold
    for each item. Without `default` the field is required."""
    metadata = {"doc": doc, "minimum": minimum, "maximum": maximum, "above": above, "pattern": pattern, "form": form, "counted": counted}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One value of a profile: its key path, its kind and its bounds."""

    path: str                       # "hardware.memory_gib"
    kind: type                      # str, bool, int or float
    many: bool                      # a list of `kind`
    length: int | None              # the list's exact length
    optional: bool                  # null = unknown
    choices: tuple[str, ...]        # () = any
    doc: str
    default: Any                    # dataclasses.MISSING = required
    minimum: float | None = None
    above: float | None = None
    pattern: str | None = None
    form: str | None = None
    counted: str | None = None
    maximum: float | None = None

    def expected(self) -> str:
        """What the field takes, in words: "an integer >= 1", "a list of 3 integers >= 1 or null"."""
        if self.choices:
            words = "one of " + ", ".join(self.choices)
        elif self.many:
            words = f"a list of {'' if self.length is None else f'{self.length} '}{KIND_WORDS[self.kind][1]}"
        else:
            words = KIND_WORDS[self.kind][0]
        if self.minimum is not None:
            words += f" >= {self.minimum:g}"
        if self.maximum is not None:
            words += f"{' and' if self.minimum is not None else ''} <= {self.maximum:g}"
        if self.above is not None:
            words += f" > {self.above:g}"
        if self.counted is not None:
            words = f"an integer >= 0 or {words}"
        if self.form:
            words += f" ({self.form})"
        return words + (" or null" if self.optional else "")

    def accept(self, value: Any) -> Any:
        """The value as the dataclass stores it (list -> tuple, int -> float for a number). Raises ValueError, saying what is wrong."""
        if value is None and self.optional:
            return None
        if not self.many:
            return self._accept_one(value)
        if not isinstance(value, list | tuple):
            raise ValueError(f"is {shown(value)}, expected {self.expected()}")
        if self.length is not None and len(value) != self.length:
            raise ValueError(f"has {len(value)} items, expected {self.expected()}")
        items = tuple(self._accept_one(item) for item in value)
        if self.kind is str and len(set(items)) != len(items):
            twice = next(item for item in items if items.count(item) > 1)
            raise ValueError(f"names {twice} twice, expected each at most once")
        return items

    def _accept_one(self, value: Any) -> Any:
        where = "holds" if self.many else "is"
        refused = ValueError(f"{where} {shown(value)}, expected {self.expected()}")
        if self.counted is not None and type(value) is int and value >= 0:
            value = self.counted.format(value)
        if self.kind is float and type(value) is int:
            try:
                value = float(value)
            except OverflowError:
                raise refused from None
        if type(value) is not self.kind or (self.kind is float and not math.isfinite(value)):
            raise refused
        if self.choices and value not in self.choices:
            raise refused
        if (self.minimum is not None and value < self.minimum) or (self.above is not None and value <= self.above):
            raise refused
        if self.maximum is not None and value > self.maximum:
            raise refused
        if self.pattern is not None and not re.fullmatch(self.pattern, value):
            raise refused
        return value


def shown(value: Any) -> str:
    """A value as an error names it: YAML's words for null and booleans, the type where the text alone would mislead ('3' is a string)."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(list(value) if isinstance(value, tuple) else value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return text if isinstance(value, int | float) else f"{text} (a {_type_word(value)})"


def _type_word(value: Any) -> str:
    return {str: "string", list: "list", tuple: "list", dict: "mapping"}.get(type(value), type(value).__name__)


@functools.cache
def sections(cls: type) -> dict[str, type]:
    """Field name -> nested dataclass, for the fields of `cls` that hold one."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if dataclasses.is_dataclass(hints[f.name])}


@functools.cache
def leaves(cls: type, prefix: str = "") -> dict[str, Leaf]:
    """Key path -> Leaf for every value of `cls` and its nested dataclasses, in declaration order. Fields without `setting()` (the
    profile's `origins`) are no values and are left out."""
    found: dict[str, Leaf] = {}
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        path = prefix + f.name
        if f.name in sections(cls):
            found.update(leaves(hints[f.name], path + "."))
        elif "doc" in f.metadata:
            bounds = {name: f.metadata[name] for name in ("doc", "minimum", "maximum", "above", "pattern", "form", "counted")}
            found[path] = Leaf(path=path, default=f.default, **_kind_of(hints[f.name]), **bounds)
    return found


def _kind_of(hint: Any) -> dict[str, Any]:
    """str | None, tuple[int, ...], tuple[int, int, int], Literal[...] -> kind, many, length, optional, choices."""
    optional, many, length, choices = False, False, None, ()
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
        optional = True
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        many, length = True, (None if parts[-1] is Ellipsis else len(parts))
        hint = parts[0]
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        hint = str
    if hint not in KIND_WORDS:
        raise TypeError(f"a profile field cannot be {hint!r}: expected str, bool, int, float, a tuple of one, or a Literal of strings")
    return {"kind": hint, "many": many, "length": length, "optional": optional, "choices": choices}


def check_fields(instance: Any) -> None:
    """The __post_init__ of a profile dataclass: every field is checked and stored in its normal form. Raises ProfileError."""
    cls = type(instance)
    for name, leaf in leaves(cls).items():
        if "." in name:
            continue                                       # a nested dataclass has checked its own
        try:
            object.__setattr__(instance, name, leaf.accept(getattr(instance, name)))
        except ValueError as error:
            raise ProfileError(f"{name} {error}", key=name) from None
    for name, nested in sections(cls).items():
        if type(getattr(instance, name)) is not nested:
            raise ProfileError(f"{name} is {shown(getattr(instance, name))}, expected a {nested.__name__}", key=name)
