"""Who holds what in a 16 x 16 tile of mma.m8n8k4, and the renumbered keys: the Python twin of csrc/volta/fragments.cuh.

The first product leaves its sums in the accumulator's form, the second wants operand A's. Keys are renumbered between them so that a
lane's four weights of a row are neighbours in shared memory (why: fragments.cuh). Here the maps are data, so that every lane, value and
bank can be gone through on a laptop. Functions return int lists by lane unless they say otherwise.
"""

from __future__ import annotations

LANES = range(32)
PAD = 4                                # halves between rows of a tile
BANKS, WORD_BYTES = 32, 4


def bit(x: int, i: int) -> int:
    return x >> i & 1


def a_row(lane: int) -> int:
    """Row (0-15) of the lane's operand A; it holds four columns, 4 * step + 0..3."""
    return (lane & 3) + 4 * bit(lane, 4) + 8 * bit(lane, 2)


def sum_row(lane: int, e: int) -> int:
    """Row (0-15) of the lane's sum e (0-7)."""
    return bit(lane, 0) + 2 * bit(e, 1) + 4 * bit(lane, 4) + 8 * bit(lane, 2)


def sum_column(lane: int, e: int) -> int:
    """Column (0-15) of the lane's sum e (0-7)."""
    return (e & 1) + 2 * bit(lane, 1) + (e & 4) + 8 * bit(lane, 3)


def b_key(lane: int) -> int:
    """First product: the key (0-15) whose four features are the lane's operand B."""
    return (lane & 3) + 4 * bit(lane, 4) + 8 * bit(lane, 3)


def b_feature(lane: int) -> int:
    """Second product: the first of the four features (0-15) that are the lane's operand B."""
    return 4 * bit(lane, 4) + 8 * bit(lane, 3)


def weight_position(lane: int, tile: int) -> int:
    """Where the lane's four weights of a row begin, of the 16 keys of `tile`: in the order of sums e = (0, 1, 4, 5), or (2, 3, 6, 7)."""
    return 4 * (tile & 1) + 8 * bit(lane, 1) + 16 * bit(lane, 3) + 32 * (tile >> 1)


def key_at(lane: int, step: int) -> int:
    """The key at position 4 * step + lane % 4: the row of V that the lane reads in that step."""
    return bit(lane, 0) + 2 * bit(step, 1) + 4 * bit(lane, 1) + 8 * bit(step, 2) + 16 * bit(step, 0) + 32 * (step >> 3)


def position_of(key: int) -> int:
    """Where a key's weight stands in a row: key bits (k0 k1 k2 k3 k4) become position bits (k0 k2 k4 k1 k3)."""
    return bit(key, 0) + 2 * bit(key, 2) + 4 * bit(key, 4) + 8 * bit(key, 1) + 16 * bit(key, 3) + 32 * (key >> 5)


def staged_place(thread: int, i: int, features: int, threads: int) -> tuple[int, int]:
    """(row, first feature) of the 16 bytes that a thread moves in its i-th step (Staged::place)."""
    sixteen, groups = (i * threads + thread) // 16, features // 32
    row = sixteen // (4 * groups) * 16 + 8 * bit(thread, 3) + sixteen // groups % 4 * 2 + bit(thread, 2)
    return row, sixteen % groups * 32 + 8 * (thread & 3)


def wavefronts(addresses: list[int], width: int) -> int:
    """Passes over the banks for one access of a warp: byte address by lane, `width` bytes each (4, 8 or 16)."""
    lanes, total = {16: 8, 8: 16}.get(width, 32), 0
    for first in range(0, len(addresses), lanes):
        banks: list[set[int]] = [set() for _ in range(BANKS)]
        for address in addresses[first : first + lanes]:
            for word in range(address // WORD_BYTES, (address + width) // WORD_BYTES):
                banks[word % BANKS].add(word)
        total += max(map(len, banks))
    return total


def main_loop_accesses(head_dim: int, keys: int, threads: int, parts: int = 1) -> dict[str, list[list[int]]]:
    """Every 8-byte access of a warp in one round of the main loop: what -> list of byte addresses by lane, from the tile's begin.

    head_dim: padded. keys: of a tile. threads: that share a tile; all of their warps' stores are listed.
    """
    row, weight_row = 2 * (head_dim + PAD), 2 * (keys + PAD)
    tiles, key_steps, feature_steps = range(keys // 16), range(keys // 4), range(head_dim // 4)
    stores = []
    for part in range(parts):
        for i in range(keys * (head_dim // parts) // 8 // threads):
            for warp in range(threads // 32):
                places = [staged_place(32 * warp + lane, i, head_dim // parts, threads) for lane in LANES]
                begin = [r * row + 2 * (f + part * (head_dim // parts)) for r, f in places]
                stores += [begin, [address + 8 for address in begin]]
    return {
        "Q loads": [[a_row(lane) * row + 8 * k for lane in LANES] for k in feature_steps],
        "K loads": [[(16 * t + b_key(lane)) * row + 8 * k for lane in LANES] for t in tiles for k in feature_steps],
        "V loads": [[key_at(lane, k) * row + 2 * (b_feature(lane) + 16 * f) for lane in LANES]
                    for k in key_steps for f in range(head_dim // 16)],
        "P stores": [[sum_row(lane, 2 * v1) * weight_row + 2 * weight_position(lane, t) for lane in LANES] for t in tiles for v1 in (0, 1)],
        "P loads": [[a_row(lane) * weight_row + 8 * k for lane in LANES] for k in key_steps],
        "K and V stores": stores,
    }
