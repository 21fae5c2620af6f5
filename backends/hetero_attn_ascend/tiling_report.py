"""Why a call is tiled as it is, in words: what `hetero-attn explain --tiling` prints."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hetero_attn_ascend.chip import Chip
from hetero_attn_ascend.tiling import Problem, Tiling, one_level_tiles, two_level_tiles


@dataclass(frozen=True)
class TilingReport:
    """str() is a page of text, to_dict() the same for programs."""

    plan: Tiling
    one_level: Tiling

    @classmethod
    def of(cls, chip: Chip, problem: Problem) -> TilingReport:
        """Raises ValueError if no tiling fits the chip."""
        return cls(two_level_tiles(chip, problem), one_level_tiles(chip, problem))

    def to_dict(self) -> dict:
        return self.plan.to_dict() | {"limited_by": self.limits(), "one_level": self.one_level.to_dict()}

    def limits(self) -> list[str]:
        """What keeps the level-1 block from being larger: the buffers that one more tile of keys or of rows would overflow."""
        plan = self.plan
        wider = {"keys": replace(plan, block_n=plan.block_n + plan.tile_n), "rows": replace(plan, block_m=plan.block_m + plan.tile_m)}
        found = []
        for name, grown in wider.items():
            over = [f"{buffer} ({used} > {getattr(plan.chip.capacity, buffer)} bytes)" for buffer, used in grown.buffers.items()
                    if used > getattr(plan.chip.capacity, buffer)]
            if over:
                found.append(f"one tile more of {name} would overflow {', '.join(over)}")
            elif name == "keys" and plan.block_n >= plan.problem.kv_len:
                found.append("a block holds all keys already")
            elif name == "rows" and plan.block_m >= plan.problem.rows:
                found.append("a block holds all rows of a head already")
            else:
                found.append(f"more {name} would fit, but the busiest core would not wait less")
        return found

    def __str__(self) -> str:
        plan, one = self.plan, self.one_level
        problem, chip = plan.problem, plan.chip
        tasks = plan.assignment()
        steps = plan.steps()
        load = [sum(steps[block] for _, block in core) for core in tasks]
        mean = sum(load) / len(load)
        rows = "rows (a group's query heads)" if problem.folded else "rows"
        lines = [
            ("chip", f"{chip.name}: {chip.cores} cores, {chip.vector_units} vector unit{'s' * (chip.vector_units > 1)} each"),
            ("level 1", f"{plan.block_m} {rows} x {plan.block_n} keys: {len(plan.steps())} row blocks a head, {sum(steps)} blocks"),
            ("level 2", f"{plan.tile_m} x {plan.tile_n} tiles, {plan.tile_k} deep; {plan.vector_rows} rows a vector sub-tile"),
        ]
        for buffer, used in plan.buffers.items():
            capacity = getattr(chip.capacity, buffer)
            lines.append((buffer if buffer != "L1" else "buffer L1", f"{used:>8} of {capacity:>8} bytes ({100 * used / capacity:.0f} %)"))
        lines += [("because" if not i else "", text) for i, text in enumerate(self.limits())]
        lines += [
            ("cores", f"{sum(map(len, tasks))} tasks, the busiest core has {max(load)} blocks, the mean is {mean:.1f}"),
            ("hand-overs", f"{plan.hand_overs()} in all, {plan.busiest_core()} on the busiest core; one level of {one.block_m} x "
                           f"{one.block_n} blocks: {one.hand_overs()} and {one.busiest_core()}"),
            ("traffic", f"{plan.traffic() / 2**20:.1f} MiB between cores and memory or L2; one level: {one.traffic() / 2**20:.1f} MiB"),
        ]
        if plan.mask_bytes:
            lines.append(("mask", f"{plan.mask_bytes / 1024:.0f} KiB for all blocks, in place of {plan.full_mask_bytes / 2**20:.0f} MiB"))
        lines.append(("", "(planned from the profile's numbers; verified: none)"))
        return "\n".join(f"{name:<11} {text}" for name, text in lines)
