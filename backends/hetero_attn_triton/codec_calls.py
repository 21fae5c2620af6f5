"""The low-bit codecs on the device, as Backend.codec_kernels() describes them: launches of codec_kernel.py and what the host must know.

Whether a value is not finite, and how many saturated, is told by a tensor of one element on the device: nothing here waits for a kernel.
"""

from __future__ import annotations

from math import ceil
from typing import Any
from weakref import WeakKeyDictionary

import torch

from hetero_attn_triton.launching import Launcher

GROUP, LARGEST = 32, {4: 7.0, 8: 127.0}
GROUPS, VALUES, COLUMNS = 16, 512, 512               # of a program: groups packed, values unpacked, features of a row at once


class CodecCalls:
    """The four methods of collectives/codec/definition.py's TorchKernels, on tensors of the launcher's device."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._tables: WeakKeyDictionary[Any, dict[torch.device, dict[str, torch.Tensor]]] = WeakKeyDictionary()

    def pack_groups(self, values: torch.Tensor, bits: int, body: torch.Tensor) -> bool | torch.Tensor:
        """values [n] of fp32, bf16 or fp16 -> body; bool [], False where one is not finite."""
        count, groups = values.numel(), -(-values.numel() // GROUP)
        if not count:
            return True
        programs = ceil(groups / GROUPS)
        bad = torch.empty(programs, dtype=torch.int32, device=values.device)
        constants = {"EIGHT": bits == 8, "BLOCK": GROUPS}
        self._launch("pack_groups", programs, (values, body, bad, count, groups, LARGEST[bits]), constants, values)
        return ~bad.any()

    def unpack_groups(self, body: torch.Tensor, bits: int, out: torch.Tensor, accumulate: bool) -> None:
        """body -> out fp32 [n], written or added to."""
        if count := out.numel():
            self._launch("unpack_groups", ceil(count / VALUES), (body, out, count, -(-count // GROUP)),
                         {"EIGHT": bits == 8, "ADD": accumulate, "BLOCK": VALUES}, out)

    def pack_features(self, values: torch.Tensor, first: int, table: Any, body: torch.Tensor) -> int | torch.Tensor:
        """values [n] -> body; int64 [], how many saturated, -1 where one is not finite."""
        count = values.numel()
        if not count:
            return 0
        place, on = Place(first, count, table), self._table(table, values.device)
        rows = (first + count - 1) // table.features - place.first_row + 1
        blank = lambda programs: torch.zeros(programs, dtype=torch.int32, device=values.device)
        bad, saturated = blank(rows), [blank(1)]
        self._launch("row_factors", rows,
                     (values, on["scale"], on["mean"], body, bad, first, count, table.features, place.factors_at, place.first_row),
                     {"WRITE": bool(place.rows), "BLOCK": COLUMNS}, values)
        if place.wide:
            saturated.append(blank(ceil(place.wide / VALUES)))
            self._launch("pack_outliers", len(saturated[-1]),
                         (values, on["outliers"], body, saturated[-1], first, place.outliers_before, place.wide, table.features,
                          on["outliers"].numel()), {"BLOCK": VALUES}, values)
        if place.kept:
            saturated.append(blank(ceil(place.kept / GROUP / GROUPS)))
            self._launch("pack_features", len(saturated[-1]),
                         (values, on["rest"], on["scale"], on["mean"], body, saturated[-1], first, place.kept,
                          first - place.outliers_before, place.first_row, table.features, on["rest"].numel(), place.factors_at, place.edge),
                         {"FACTORS": bool(place.rows), "BLOCK": GROUPS}, values)
        return torch.cat(saturated).sum().masked_fill_(bad.any(), -1)

    def unpack_features(self, body: torch.Tensor, first: int, table: Any, out: torch.Tensor, accumulate: bool) -> None:
        """body -> out fp32 [n], written or added to."""
        count = out.numel()
        if not count:
            return
        place, on = Place(first, count, table), self._table(table, out.device)
        self._launch("unpack_features", ceil(count / VALUES),
                     (body, on["before"], on["step"], on["mean"], out, first, count, place.kept, place.outliers_before, place.first_row,
                      table.features, on["outliers"].numel(), place.factors_at, place.edge),
                     {"FACTORS": bool(place.rows), "ADD": accumulate, "BLOCK": VALUES}, out)

    def _launch(self, kernel: str, programs: int, arguments: tuple, constants: dict[str, Any], near: torch.Tensor) -> None:
        self._launcher.launch(kernel, programs, arguments, constants, 4, 1, near.device, exact=True)

    def _table(self, table: Any, device: torch.device) -> dict[str, torch.Tensor]:
        """A sender's table on the device, copied once: scale, mean, step [E]; outliers, rest (the others) and `before` [E + 1]."""
        known = self._tables.setdefault(table, {})
        if device not in known:
            before = torch.cat([torch.zeros(1, dtype=torch.int32), table.is_outlier.to(torch.int32).cumsum(0, dtype=torch.int32)])
            parts = {"scale": table.scale, "mean": table.mean, "step": table.step, "outliers": table.outliers, "before": before,
                     "rest": (~table.is_outlier).nonzero().flatten().to(torch.int32)}
            known[device] = {name: each.to(device) for name, each in parts.items()}
        return known[device]


class Place:
    """Where the parts of a payload lie: `wide` outliers' bf16, the rows' factors from byte factors_at, the q of `kept` others from edge."""

    def __init__(self, first: int, count: int, table: Any) -> None:
        self.wide, self.rows = table.outliers_in(first, count), table.rows_in(first, count)
        self.kept, self.first_row = count - self.wide, first // table.features
        self.outliers_before = table.outliers_in(0, first)
        self.factors_at, self.edge = 2 * self.wide, 2 * (self.wide + self.rows)
