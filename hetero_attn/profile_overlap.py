"""How a decoder's steps are scheduled on a device: the profile's section `overlap`, thresholds and what `tune --schedule` measured.

The thresholds are TokenWeave's where nobody has measured better: a split reads every weight once more, and a short step does not get that
back. Tile sizes are the matrix product's own; without them parts are only aligned.
"""

from __future__ import annotations

from dataclasses import dataclass

from hetero_attn.profile_fields import ProfileError, check_fields, setting

MOST_PARTS = 4
MEASURED = ("attention_inner", "attention_product", "mlp_inner", "mlp_product", "sum", "coded_sum")
COST = {"pattern": rf"({'|'.join(MEASURED)}) [1-9][0-9]{{0,8}} [0-9]{{1,18}}(\.[0-9]{{1,18}})?(e[+-]?[0-9]{{1,2}})?",
        "form": f"what, rows >= 1, milliseconds >= 0, as in 'sum 64 1.5'; what is one of {', '.join(MEASURED)}"}
CONDITION = {"pattern": r"(dtype|codec|communicator) [!-~]+|host [0-9]+ [!-~]+", "form": "as in 'dtype bfloat16', 'host 0 alpha'"}


@dataclass(frozen=True)
class Overlap:
    """Where to cut a step. Raises ProfileError for a value out of bounds."""

    parts: int | None = setting("Parts of a weave, at most 4; null = what the cost model likes, else 2", default=None, minimum=2,
                                maximum=MOST_PARTS)
    tiles: int | None = setting("Tiles of a tiled all-reduce; null = what the cost model likes, else 4", default=None, minimum=2)
    shard_tokens: int = setting("Fewest tokens of a step whose residual is sharded by rows; below, each rank norms all rows and a sum is "
                                "one message sooner done", default=64, minimum=1)
    min_tokens: int = setting("Fewest tokens of a step of a dense model that is cut", default=1024, minimum=2)
    min_tokens_moe: int = setting("The same of a mixture of experts", default=2048, minimum=2)
    row_alignment: int | None = setting("Parts begin at multiples of so many rows; null = tile_shape's, else the matrix step's",
                                        default=None, minimum=1)
    tile_shape: tuple[int, int] | None = setting("Rows and columns of one tile of the matrix product, for the count of waves", default=None,
                                                 minimum=1)
    communication_units: int = setting("Units (of hardware.units) that communication keeps from the matrix product", default=0, minimum=0)
    attention_ctas: int | None = setting("CTAs (one a unit) of a sum after an attention that runs beside products, 2 to 32; null = at most "
                                         "8. For communicators that run on the device's own units", default=None, minimum=2)
    mlp_ctas: int | None = setting("The same of a sum after an MLP", default=None, minimum=2)
    pair_ns: float | None = setting("Attention of one layer and rank for a query and a key it sees, nanoseconds", default=None, minimum=0)
    efficiency: float | None = setting("How much of a cut's expected gain is real, 0 to 1: less where computing and communicating want "
                                       "the same processor; null = all", default=None, minimum=0, maximum=1)
    further_ms: float | None = setting("What a sum beside computing takes of a step, however few rows it has, milliseconds; null = nothing",
                                       default=None, minimum=0)
    measured: tuple[str, ...] = setting("What a layer's pieces and sums took", default=(), **COST)
    measured_on: tuple[str, ...] = setting("What `measured` holds for: the dtype, the codec, the communicator, and each rank's host; where "
                                           "a model runs otherwise, measured values are left aside. Empty = not known", default=(),
                                           **CONDITION)

    def __post_init__(self):
        check_fields(self)
        points = [text.rpartition(" ")[0] for text in self.measured]
        if twice := next((point for point in points if points.count(point) > 1), None):
            raise ProfileError(f"overlap.measured holds {twice!r} twice, with unlike milliseconds; keep one", key="overlap.measured")
