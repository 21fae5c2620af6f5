"""Where to cut: TokenWeave's parts by the wave formula, FastAttention's long and short tiles by which lane is the longer one.

A matrix product of M rows and N columns runs in waves of tiles over the units that communication leaves it. Two halves must not need more
waves than the whole, or the cut costs what it wins. Pure Python; every rank finds the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PIECES, LEAST_PIECE, LEAST_RATIO = 3, 16, 0.25       # of a part that enters or leaves in pieces: most, rows of the shortest, steepness
REACH = 8                                            # steps of the alignment that a boundary may move to either side


@dataclass(frozen=True)
class ProductTiles:
    """How a device's matrix product is cut: tiles of rows x columns, over `units` at a time."""

    rows: int
    columns: int
    units: int

    def waves(self, m: int, n: int) -> int:
        """Turns of all units for a product of m rows and n columns: ceil(ceil(m/rows) ceil(n/columns) / units)."""
        return math.ceil(math.ceil(m / self.rows) * math.ceil(n / self.columns) / self.units)


@dataclass(frozen=True)
class Product:
    """A layer's product of `columns` columns; `times` of them with `share` of the rows each (experts, which see a part of the tokens)."""

    columns: int
    share: float = 1.0
    times: int = 1

    def waves(self, rows: int, tiles: ProductTiles) -> int:
        """Turns of all units for a part of so many rows. Times after one another: each has its own rows."""
        return self.times * tiles.waves(math.ceil(rows * self.share), self.columns)


def split_rows(
    total: int, parts: int, *, alignment: int = 1, products: Sequence[Product] = (), tiles: ProductTiles | None = None
) -> list[int]:
    """Rows of `total` where up to `parts` - 1 further parts begin: multiples of the alignment with the fewest waves in all, and of those
    the ones nearest to even.

    products: a layer's; without them and `tiles` only evenness counts. Fewer parts come back where there are not enough aligned rows for
    all.
    """
    if total < 0 or parts < 1 or alignment < 1:
        raise ValueError(f"split_rows: total {total}, parts {parts}, alignment {alignment}: expected at least 0, 1 and 1")
    parts = max(1, min(parts, total // alignment))
    known: dict[int, int] = {}

    def waves(rows: int) -> int:
        if tiles is None:
            return 0
        if rows not in known:
            known[rows] = sum(product.waves(rows, tiles) for product in products)
        return known[rows]

    # ways to the row -> (waves so far, unevenness so far, boundaries)
    ways: dict[int, tuple[int, float, list[int]]] = {0: (0, 0.0, [])}
    for part in range(1, parts):
        even = part * total / parts
        middle = round(even / alignment)
        places = [step * alignment for step in range(middle - REACH, middle + REACH + 1) if 0 < step * alignment < total]
        ways = {
            place: min((cost + waves(place - begin), off + abs(place - even), [*before, place])
                       for begin, (cost, off, before) in ways.items() if begin < place)
            for place in places if any(begin < place for begin in ways)
        }
    return min((cost + waves(total - begin), off, before) for begin, (cost, off, before) in ways.items())[2]


def split_tiles(total: int, tiles: int, product_s: float, sum_s: float, *, alignment: int = 1) -> list[int]:
    """Rows of `total` where up to `tiles` - 1 further tiles begin: equal long ones and one short one.

    product_s, sum_s: seconds of the whole product and of the whole sum. Where the product is longer the short tile comes last, so that
    little is left to be summed after the last product; where the sum is longer it comes first, so that summing begins early. The short
    tile is min/max of the two times as long as the others: then neither lane waits in between, and at most 1/tiles of the
    shorter one shows.
    """
    tiles = max(1, min(tiles, total // alignment))
    if tiles == 1:
        return []
    ratio = min(product_s, sum_s) / max(product_s, sum_s) if max(product_s, sum_s) > 0 else 1.0
    long = math.ceil(total / (tiles - 1 + ratio) / alignment) * alignment
    tiles = min(tiles, math.ceil(total / long))                             # rounded up, fewer may do
    first = total - (tiles - 1) * long if sum_s > product_s else long
    return [first + tile * long for tile in range(tiles - 1)]


def shrinking(rows: int, ratio: float, *, alignment: int = 1) -> tuple[int, ...]:
    """Rows of up to PIECES pieces of `rows`, each about `ratio` of the one before, all but the first multiples of the alignment; () where
    the shortest of two would be shorter than LEAST_PIECE.

    ratio: seconds that a row travels over seconds that it is computed. A piece then travels while the next, shorter one is computed, and
    what stands alone at the end is the shortest piece's journey. Backwards they are pieces that are computed while the next, longer one
    travels.
    """
    ratio = min(max(ratio, LEAST_RATIO), 1.0)
    for pieces in range(PIECES, 1, -1):
        weights = [ratio**place for place in range(pieces)]
        short = [int(rows * weight / sum(weights) / alignment) * alignment for weight in weights[1:]]
        if min(short) >= LEAST_PIECE:
            return rows - sum(short), *short
    return ()


def dealt(sizes: Sequence[int], row_counts: Callable[[int], Sequence[int]]) -> list[list[slice]]:
    """For each piece of sizes[i] rows, one slice for each rank: its share of the rows that this rank owns of them all.

    row_counts: how many of so many rows each rank owns (Communicator.row_counts). Raises ValueError where the pieces' shares are not the
    whole's; they are if all sizes but one are multiples of the number of ranks.
    """
    shares, whole = [row_counts(size) for size in sizes], row_counts(sum(sizes))
    if [sum(own) for own in zip(*shares)] != list(whole):
        raise ValueError(f"pieces of {list(sizes)} rows cannot be dealt to {len(whole)} ranks: expected multiples of {len(whole)}, all but "
                         "one")
    at, found = [sum(whole[:rank]) for rank in range(len(whole))], []
    for share in shares:
        found.append([slice(begin, begin + count) for begin, count in zip(at, share)])
        at = [begin + count for begin, count in zip(at, share)]
    return found
