// Who holds what: the index maps of mma.m8n8k4 in a 16 x 16 tile of a warp, and the re-laid order of keys.
// Python twin: backends/hetero_attn_volta/relayout.py, compared with the hardware's definition for every lane and value.
//
// A warp's four quad pairs q (lanes 4q..4q+3 and 16+4q..16+4q+3) own the four 8 x 8 quarters: rows by bit 0 of q, columns by bit 1. With
// lane bits l0..l4 and value bits v0 v1 v2 a sum stands at
//     row    l0 + 2 v1 + 4 l4 + 8 l2        column  v0 + 2 l1 + 4 v2 + 8 l3
// and operand A wants 4 consecutive columns of row l0 + 2 l1 + 4 l4 + 8 l2. Between the two products the softmax's weights must pass from
// the first form to the second. The order in which the second product adds up its keys is free, so the keys of a tile of 32 are renumbered,
// key bits (k0 k1 k2 k3 k4) to position bits (k0 k2 k4 k1 k3): then a lane's four weights of a row are neighbours, it stores them with one
// 8-byte access, operand A is read back with one, and nobody shuffles or rearranges. V's rows are read in the same order, which costs
// nothing: it is a term of a lane's address.
// Bank conflicts: rows of all tiles are padded by 4 halves, so a row takes 2 mod 16 words. An 8-byte access is served half a warp at a
// time; each half warp's 16 pairs of words are different mod 32 for K, P and V loads, P stores and K, V stores alike
// (tests/test_volta_relayout.py goes through all of them, tests/test_volta_layout.py counts them in the running kernel).
#pragma once

constexpr int PAD = 4;

static __device__ __forceinline__ int bit(int x, int i) { return x >> i & 1; }

// row of the lane's operand A, and of its two rows of sums (v1)
static __device__ __forceinline__ int a_row(int lane) { return (lane & 3) + 4 * bit(lane, 4) + 8 * bit(lane, 2); }
static __device__ __forceinline__ int sum_row(int lane, int v1) { return bit(lane, 0) + 2 * v1 + 4 * bit(lane, 4) + 8 * bit(lane, 2); }
// column of sum value e (0..7)
static __device__ __forceinline__ int sum_column(int lane, int e) { return (e & 1) + 2 * bit(lane, 1) + (e & 4) + 8 * bit(lane, 3); }
// the key whose 4 features are the lane's operand B in the first product
static __device__ __forceinline__ int b_key(int lane) { return (lane & 3) + 4 * bit(lane, 4) + 8 * bit(lane, 3); }
// first of the 4 features that are the lane's operand B in the second product
static __device__ __forceinline__ int b_feature(int lane) { return 4 * bit(lane, 4) + 8 * bit(lane, 3); }
// position of a lane's four weights (v0, v2) of a row, of the 16-key tile t
static __device__ __forceinline__ int weight_position(int lane, int t) {
  return 4 * (t & 1) + 8 * bit(lane, 1) + 16 * bit(lane, 3) + 32 * (t >> 1);
}
// the key at position 4 * step + lane % 4
static __device__ __forceinline__ int key_at(int lane, int step) {
  return bit(lane, 0) + 2 * bit(step, 1) + 4 * bit(lane, 1) + 8 * bit(step, 2) + 16 * bit(step, 0) + 32 * (step >> 3);
}

// Two words, 8 bytes, from or to shared memory.
static __device__ __forceinline__ void load_pair(unsigned (&pair)[2], const unsigned short* from) {
  const uint2 both = *reinterpret_cast<const uint2*>(from);
  pair[0] = both.x;
  pair[1] = both.y;
}
static __device__ __forceinline__ void store_pair(unsigned short* to, unsigned first, unsigned second) {
  *reinterpret_cast<uint2*>(to) = make_uint2(first, second);
}
