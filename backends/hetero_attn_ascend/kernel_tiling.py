"""Two levels as Triton and its compiler for Ascend can carry them out, and the options by which the compiler is told of level 2.

Level 1 is the Triton block: what a tl.dot gives goes from Cube to Vector as a whole, through a workspace in device memory (so the options'
documentation; it counts the workspaces), and a wide block is few hand-overs. Level 2 is what bishengir, which comes with CANN, cuts inside:
`tile_mix_cube_loop` products a block and `tile_mix_vector_loop` pieces of the softmax, each 1, 2 or 4, with two workspaces so that Cube
works one block ahead. Small products written into the kernel would by that reading each be a hand-over, which is one level again.

NOTE: nobody here has seen what bishengir makes of it: along which axis it cuts (rows of the softmax, keys before rows of the product are
assumed), what it keeps in UB beside our sums, whether it takes these numbers or others. `make npu-check` is where that shows.
"""

from __future__ import annotations

from dataclasses import dataclass

from hetero_attn_ascend import tiling_mask
from hetero_attn_ascend.chip import Buffers
from hetero_attn_ascend.tiling import FP32, Tiling

LOOPS = (1, 2, 4)                       # numbers of level-2 pieces that the compiler's documentation names
WORKSPACES = 2                          # level-1 blocks in flight between Cube and Vector


def power_of_two(size: int) -> int:
    """The next power of two, 1 at least."""
    return 1 << max(size - 1, 0).bit_length()


@dataclass(frozen=True)
class KernelTiling(Tiling):
    """A plan in powers of two. Against a hand-written kernel's it holds all weights of a block in L1, and a fp32 copy of the scores that
    it works on in UB; features are padded to a power of two."""

    @property
    def buffers(self) -> dict[str, int]:
        used, chip, element = super().buffers, self.chip, self.problem.element
        ring = 2 * chip.aligned("L1", self.tile_m * self.tile_n * element)
        used["L1"] += max(0, chip.aligned("L1", self.block_m * self.block_n * element) - ring)
        used["UB"] += chip.aligned("UB", self.vector_rows * self.block_n * FP32)
        return {name: used[name] for name in Buffers._fields}

    @property
    def padded_k(self) -> int:
        return max(self.chip.matrix_shape[2], power_of_two(self.problem.head_dim))

    @property
    def padded_v(self) -> int:
        return max(self.chip.matrix_shape[1], power_of_two(self.problem.v_head_dim))

    @property
    def first_keys(self) -> int:
        """The kernel's blocks stand at multiples of their width."""
        return self.block_n

    @property
    def mask_side(self) -> int:
        """The kernel's masks are cut for whole blocks."""
        return tiling_mask.side(self.block_m, self.block_n)

    @property
    def cube_loop(self) -> int:
        """Level-2 products of a level-1 block."""
        return self.block_m // self.tile_m * (self.block_n // self.tile_n)

    @property
    def vector_loop(self) -> int:
        """Pieces in which a vector unit does its rows of a level-1 block."""
        return -(-self.block_m // self.chip.vector_units) // self.vector_rows

    def to_dict(self) -> dict:
        return super().to_dict() | {"compiler_options": compiler_options(self)}


def compiler_options(plan: KernelTiling) -> dict[str, int | bool]:
    """triton-ascend's options (NPUOptions of 3.2.0) for a launch of this plan."""
    return {
        "multibuffer": True,
        "limit_auto_multi_buffer_only_for_local_buffer": False,     # else those below have no effect
        "set_workspace_multibuffer": WORKSPACES,
        "tile_mix_cube_loop": plan.cube_loop,
        "tile_mix_vector_loop": plan.vector_loop,
    }
