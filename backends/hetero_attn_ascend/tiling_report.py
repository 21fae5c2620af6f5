"""Why a call is tiled as it is, in words: what `hetero-attn explain --tiling` prints. The blocks are those that our kernel launches."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hetero_attn_ascend.chip import Chip
from hetero_attn_ascend.kernel_tiling import KernelTiling, compiler_options
from hetero_attn_ascend.planner import MAX_KERNEL_BLOCK, kernel_plan, kernel_tiles, one_level_tiles, two_level_tiles
from hetero_attn_ascend.tiling import Problem, Tiling


@dataclass(frozen=True)
class TilingReport:
    """str() is a page of text, to_dict() the same for programs. plan: the kernel's. free: without Triton's powers of two and the
    compiler's numbers of tiles, what a kernel written by hand could do. by_operators: the call itself goes to torch_npu's operators."""

    plan: KernelTiling
    free: Tiling
    one_level: Tiling
    by_operators: bool = False

    @classmethod
    def of(cls, chip: Chip, problem: Problem, by_operators: bool = False) -> TilingReport:
        """Raises ValueError if no tiling fits the chip."""
        return cls(kernel_tiles(chip, problem), two_level_tiles(chip, problem), one_level_tiles(chip, problem), by_operators)

    def to_dict(self) -> dict:
        return self.plan.to_dict() | {"limited_by": self.limits(), "free": self.free.to_dict(), "one_level": self.one_level.to_dict(),
                                      "by_operators": self.by_operators}

    def limits(self) -> list[str]:
        """What keeps the level-1 block from being larger: the buffers that a block of twice the keys or rows would overflow."""
        plan, found = self.plan, []
        for name, longest, size, twice, most in (
            ("keys", plan.problem.kv_len, plan.block_n, {"block_n": 2 * plan.block_n}, MAX_KERNEL_BLOCK[1]),
            ("rows", plan.problem.rows, plan.block_m, {"block_m": 2 * plan.block_m}, MAX_KERNEL_BLOCK[0]),
        ):
            block = replace(plan, **twice)
            wider = kernel_plan(plan.chip, plan.problem, block.block_m, block.block_n)
            over = [] if wider is None else [f"{buffer} ({used} > {getattr(plan.chip.capacity, buffer)} bytes)"
                                             for buffer, used in wider.buffers.items() if used > getattr(plan.chip.capacity, buffer)]
            if size >= longest:
                found.append(f"a block holds all {name}{' of a head' * (name == 'rows')} already")
            elif size >= most:
                found.append(f"{most} {name} are the most that are tried")
            elif wider is None:
                found.append(f"twice the {name} would need more than four level-2 tiles for L0A, L0B and L0C")
            elif over:
                found.append(f"twice the {name} would overflow {', '.join(over)}")
            else:
                found.append(f"twice the {name} would fit, but be no quicker by the model")
        return found

    def __str__(self) -> str:
        plan, free, one = self.plan, self.free, self.one_level
        problem, chip = plan.problem, plan.chip
        tasks = plan.assignment()
        steps = plan.steps()
        load = [sum(steps[block] for _, block in core) for core in tasks]
        mean = sum(load) / len(load)
        rows = "rows (a group's query heads)" if problem.folded else "rows"
        lines = [
            ("chip", f"{chip.name}: {chip.cores} cores, {chip.vector_units} vector unit{'s' * (chip.vector_units > 1)} each"),
            ("serves", "this call itself goes to torch_npu's fused operators, which tile by themselves; below is our kernel's plan for it"
                       if self.by_operators else "our own kernel serves this call, by this plan"),
            ("level 1", f"{plan.block_m} {rows} x {plan.block_n} keys: {len(steps)} row blocks a head, {sum(steps)} blocks"),
            ("level 2", f"{plan.tile_m} x {plan.tile_n} tiles, {plan.tile_k} deep; {plan.vector_rows} rows a vector sub-tile"),
            ("compiler", ", ".join(f"{name}={value}" for name, value in compiler_options(plan).items() if "loop" in name or "set" in name)),
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
            ("by hand", f"{free.block_m} x {free.block_n} in {free.tile_m} x {free.tile_n} x {free.tile_k}, free of powers of two: "
                        f"{free.hand_overs()} hand-overs, {free.traffic() / 2**20:.1f} MiB"),
        ]
        if plan.mask_bytes:
            lines.append(("mask", f"{plan.mask_bytes / 1024:.0f} KiB for all blocks, in place of {plan.full_mask_bytes / 2**20:.0f} MiB"))
        lines.append(("", "(planned from the profile's numbers; verified: none)"))
        return "\n".join(f"{name:<11} {text}" for name, text in lines)
