"""What a check found: its status, its figures against their bars, and a table for the page."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

PASSED, FAILED, BELOW, SKIPPED = "passed", "failed", "below its bar", "skipped"


@dataclass(frozen=True)
class Figure:
    """One number with its unit; bar: the least it should be, None where there is none."""

    what: str
    value: float
    unit: str
    bar: float | None = None

    @property
    def reached(self) -> bool:
        return self.bar is None or self.value >= self.bar

    def __str__(self) -> str:
        against = "" if self.bar is None else f" ({'reaches' if self.reached else 'below'} its bar of {self.bar:g})"
        return f"{self.what}: {self.value:.3g} {self.unit}{against}"


@dataclass(frozen=True)
class Outcome:
    """status: one of the four words above. table: the first row is the head."""

    status: str
    text: str = ""
    figures: tuple[Figure, ...] = ()
    table: tuple[tuple[str, ...], ...] = ()
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"figures": [asdict(figure) | {"reached": figure.reached} for figure in self.figures]}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Outcome:
        """What to_dict() gave, also by way of JSON."""
        figures = tuple(Figure(**{name: value for name, value in each.items() if name != "reached"}) for each in found["figures"])
        return cls(**found | {"figures": figures, "table": tuple(map(tuple, found["table"]))})


def judged(text: str, figures: list[Figure], table: list[tuple[str, ...]], missing: list[str] = ()) -> Outcome:
    """An outcome by its figures: passed where all reach their bars. missing: bars that nothing could be held to, which is a failure."""
    status = FAILED if missing else PASSED if all(figure.reached for figure in figures) else BELOW
    return Outcome(status, "\n".join([text, *missing]), tuple(figures), tuple(table))


def skipped(reason: str) -> Outcome:
    return Outcome(SKIPPED, reason)
