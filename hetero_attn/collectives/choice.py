"""Which algorithm and codec serve a call: the same answer on every rank, from what all ranks know of the call.

A Choice is asked for every collective, so it only looks up. The plain one leaves everything to torch.distributed; Fixed follows a profile
that names an algorithm; Table holds what was chosen for each size of message from the link that was measured (tuning.py), and travels as
JSON, so that no rank can differ by a rounding.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from hetero_attn.collectives.algorithms import NAMES, OPERATIONS
from hetero_attn.collectives.coding import WIDER

NATIVE = "native"
PLAIN = "none"                                       # the codec that changes nothing
NARROW = "16-bit floats"                             # travel as fp32 where partial sums travel
WIDE = "other dtypes"


class Route(NamedTuple):
    """How a call travels: an algorithm of algorithms.NAMES or 'native', and a codec or 'none'."""

    algorithm: str = NATIVE
    codec: str = PLAIN


class Choice:
    """torch.distributed's own collectives, whatever the call."""

    def pick(self, operation: str, nbytes: int, dtype: torch.dtype, site: str = "") -> Route:
        """The route of a call. operation: one of OPERATIONS; nbytes: of the whole tensor (all_gather: the result) in `dtype`."""
        return Route()

    @property
    def coded(self) -> bool:
        """Whether a call may get a codec."""
        return False

    def exact(self) -> Choice:
        """The same algorithms without a codec."""
        return self

    def to_json(self) -> str:
        """What from_json() makes an equal choice of."""
        return json.dumps({"kind": NATIVE})


class Fixed(Choice):
    """One route for everything, as a profile may ask for it. Raises ValueError for an unknown algorithm."""

    def __init__(self, route: Route) -> None:
        if route.algorithm not in (NATIVE, *NAMES):
            raise ValueError(f"algorithm is {route.algorithm!r}, expected one of {', '.join((NATIVE, *NAMES))}")
        self.route = route

    def pick(self, operation: str, nbytes: int, dtype: torch.dtype, site: str = "") -> Route:
        return self.route

    @property
    def coded(self) -> bool:
        return self.route.codec != PLAIN

    def exact(self) -> Choice:
        return Fixed(Route(self.route.algorithm))

    def to_json(self) -> str:
        return json.dumps({"kind": "fixed", "route": list(self.route)})


class Table(Choice):
    """A route for each operation, kind of dtype and size: that of the nearest size (by ratio) in the table.

    rows: (operation, NARROW or WIDE) -> {bytes, a power of two: Route}; what is not in it is native.
    """

    def __init__(self, rows: Mapping[tuple[str, str], Mapping[int, Route]]) -> None:
        for (operation, kind), sizes in rows.items():
            if operation not in OPERATIONS or kind not in (NARROW, WIDE) or not sizes:
                raise ValueError(f"a table of routes has rows for {operation!r}, {kind!r}: expected one of {', '.join(OPERATIONS)}, "
                                 f"{NARROW!r} or {WIDE!r}, and a size at least")
        self.rows = {key: dict(sorted(sizes.items())) for key, sizes in rows.items()}
        self._by_exponent = {key: _by_exponent(sizes) for key, sizes in self.rows.items()}

    def pick(self, operation: str, nbytes: int, dtype: torch.dtype, site: str = "") -> Route:
        exponents = self._by_exponent.get((operation, NARROW if dtype in WIDER else WIDE))
        # Rounded to the next power of two by ratio: 2^e·sqrt(2) and above count as 2^(e+1); squares keep it in whole numbers.
        return exponents[min(((nbytes * nbytes).bit_length()) // 2, len(exponents) - 1)] if exponents else Route()

    @property
    def coded(self) -> bool:
        return any(route.codec != PLAIN for sizes in self.rows.values() for route in sizes.values())

    def exact(self) -> Choice:
        return Table({key: {size: Route(route.algorithm) for size, route in sizes.items()} for key, sizes in self.rows.items()})

    def to_json(self) -> str:
        rows = [[operation, kind, size, *route] for (operation, kind), sizes in self.rows.items() for size, route in sizes.items()]
        return json.dumps({"kind": "table", "rows": rows})


class BySite(Choice):
    """One choice at some sites of the model, those that were calibrated, and another everywhere else."""

    def __init__(self, sites: Iterable[str], inside: Choice, elsewhere: Choice) -> None:
        self.sites, self.inside, self.elsewhere = frozenset(sites), inside, elsewhere

    def pick(self, operation: str, nbytes: int, dtype: torch.dtype, site: str = "") -> Route:
        return (self.inside if site in self.sites else self.elsewhere).pick(operation, nbytes, dtype, site)

    @property
    def coded(self) -> bool:
        return self.inside.coded or self.elsewhere.coded

    def exact(self) -> Choice:
        return BySite(self.sites, self.inside.exact(), self.elsewhere.exact())

    def to_json(self) -> str:
        parts = [json.loads(each.to_json()) for each in (self.inside, self.elsewhere)]
        return json.dumps({"kind": "sites", "sites": sorted(self.sites), "inside": parts[0], "elsewhere": parts[1]})


def _by_exponent(sizes: Mapping[int, Route]) -> list[Route]:
    """The route of 2^0, 2^1, ... up to the largest size of the table: each that of the nearest size, the smaller of two."""
    known = sorted((size.bit_length() - 1, route) for size, route in sizes.items())
    return [min(known, key=lambda entry: (abs(entry[0] - exponent), entry[0]))[1] for exponent in range(known[-1][0] + 1)]


def from_json(text: str) -> Choice:
    """The choice that to_json() wrote. Raises ValueError for anything else."""
    found = json.loads(text)
    if found["kind"] == "fixed":
        return Fixed(Route(*found["route"]))
    if found["kind"] == "table":
        return Table(_rows(found["rows"]))
    if found["kind"] == "sites":
        return BySite(found["sites"], *(from_json(json.dumps(found[part])) for part in ("inside", "elsewhere")))
    if found["kind"] == NATIVE:
        return Choice()
    raise ValueError(f"a choice is of kind {found['kind']!r}, expected {NATIVE}, fixed, table or sites")


def _rows(flat: Iterable[tuple[str, str, int, str, str]]) -> dict[tuple[str, str], dict[int, Route]]:
    rows: dict[tuple[str, str], dict[int, Route]] = {}
    for operation, kind, size, algorithm, codec in flat:
        rows.setdefault((operation, kind), {})[size] = Route(algorithm, codec)
    return rows
