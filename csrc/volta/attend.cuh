// The main loop: rows of queries against a range of keys, for one warp of a group that shares its tiles of keys and values.
//
// THREADS share the tiles: a whole block (forward.cu: each warp has rows of its own) or one warp (decode.cu: each has keys of its own).
// One round, with `meet` for the barrier of those who share:
//     issue loads of V | S = Q K^T | softmax, weights to shared memory | meet if one buffer serves K and V | store V | meet
//     issue loads of the next K | O += P V | meet if one buffer | store K | meet
// so that each load has a product to hide behind, in one set of registers, and a tile costs two barriers (four where K and V share).
// Where a tile is too large for one set (PARTS > 1), its first part is loaded ahead and the others when it is stored.
#pragma once
#include "scores.cuh"
#include "staging.cuh"

// Shared memory of a group, in halves: tiles first, then 16-row tiles of weights. tiling.py computes the same.
// Compile-time: KEYS a tile, ROW_TILES of 16 queries a warp, Q_IN_REGISTERS, ONE_BUFFER (K and V take turns in one tile), PARTS.
struct Memory {
  static constexpr int KEY_TILE = KEYS * ROW, WEIGHT_ROW = KEYS + PAD, WEIGHTS = 16 * WEIGHT_ROW;
  static constexpr int VALUES_AT = ONE_BUFFER ? 0 : KEY_TILE, WEIGHTS_AT = VALUES_AT + KEY_TILE;
  unsigned short *keys, *values, *weights;             // weights: this warp's
  unsigned* bad;                                       // [2][(KEYS + 31) / 32]: keys whose values are not finite, in turns
};

template <int THREADS>
struct Attend {
  static constexpr int KEY_TILES = KEYS / 16, STEPS = HEAD_DIM / 4, FEATURE_TILES = HEAD_DIM / 16, BAD_WORDS = (KEYS + 31) / 32;
  static_assert(KEYS % 32 == 0, "keys are renumbered in groups of 32");

  float out[ROW_TILES][FEATURE_TILES][8];
  float maximum[ROW_TILES][2], sum[ROW_TILES][2];
  unsigned spoiled;                                    // bit 2 r + v1: that row of the lane sees a value that is not finite
  unsigned q[Q_IN_REGISTERS ? ROW_TILES : 1][Q_IN_REGISTERS ? STEPS : 1][2];
  const unsigned short* q_tile;                        // this warp's rows in shared memory

  static __device__ __forceinline__ void meet() {
    if (THREADS > 32) __syncthreads();
    else __syncwarp();
  }

  __device__ __forceinline__ void begin(const unsigned short* q_rows, int lane) {
    q_tile = q_rows;
    spoiled = 0;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
      for (int f = 0; f < FEATURE_TILES; f++)
#pragma unroll
        for (int e = 0; e < 8; e++) out[r][f][e] = 0.0f;
#pragma unroll
      for (int v1 = 0; v1 < 2; v1++) {
        maximum[r][v1] = -INFINITY_F;
        sum[r][v1] = 0.0f;
      }
      if (Q_IN_REGISTERS) {
#pragma unroll
        for (int k = 0; k < STEPS; k++) load_pair(q[r][k], q_tile + (16 * r + a_row(lane)) * ROW + 4 * k);
      }
    }
  }

  // Keys first, first + stride, ... (tiles of KEYS) up to end. rows [ROW_TILES][2]; whole_first .. whole_last: seen by every row.
  __device__ __forceinline__ void run(const Call& call, const Sequence& s, const Row (&rows)[ROW_TILES][2], int b, const Rows& keys,
                                      const Rows& values, const Memory& memory, int first, int stride, int end, int whole_first,
                                      int whole_last, int thread) {
    const int lane = thread & 31;
    Staged<KEYS, HEAD_DIM / PARTS, THREADS> staged;
    if (first < end) {
      staged.load(keys, first, end, 0, thread);
      if (thread < 2 * BAD_WORDS) memory.bad[thread] = 0;
      put(staged, memory.keys, keys, first, end, nullptr, thread);
    }
    meet();
    int turn = 0;
    for (int key = first; key < end; key += stride, turn ^= 1) {
      const bool whole = key >= whole_first && key + KEYS <= whole_last;
      unsigned* bad = memory.bad + turn * BAD_WORDS;
      staged.load(values, key, end, 0, thread);
      float scores[ROW_TILES][KEY_TILES][8];
      products(scores, memory.keys, lane);
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++) {
        finish_scores(scores[r], call, s, rows[r], b, key, whole, lane);
        float rescale[2];
#pragma unroll
        for (int v1 = 0; v1 < 2; v1++) rescale[v1] = update_row(scores[r], v1, maximum[r][v1], sum[r][v1]);
#pragma unroll
        for (int f = 0; f < FEATURE_TILES; f++)
#pragma unroll
          for (int e = 0; e < 8; e++) out[r][f][e] *= rescale[bit(e, 1)];
        store_weights(scores[r], memory.weights + r * Memory::WEIGHTS, lane);
      }
      if (ONE_BUFFER) meet();
      put(staged, memory.values, values, key, end, whole ? nullptr : bad, thread);
      meet();
      if (key + stride < end) staged.load(keys, key + stride, end, 0, thread);
      add_values(memory, lane);
      if (!whole) spoil(rows, bad, key);
      if (thread < BAD_WORDS) memory.bad[(turn ^ 1) * BAD_WORDS + thread] = 0;
      if (ONE_BUFFER) meet();
      if (key + stride < end) put(staged, memory.keys, keys, key + stride, end, nullptr, thread);
      meet();
    }
  }

 private:
  // Store the tile of rows first ..., whose first part is in `staged`; with `bad`, only what is finite (Staged::store_finite).
  static __device__ __forceinline__ void put(Staged<KEYS, HEAD_DIM / PARTS, THREADS>& staged, unsigned short* tile, const Rows& rows,
                                             int first, int end, unsigned* bad, int thread) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      const int feature = part * (HEAD_DIM / PARTS);
      if (part) staged.load(rows, first, end, feature, thread);
      if (bad) staged.store_finite(tile + feature, bad, thread);
      else staged.store(tile + feature, thread);
    }
  }

  __device__ __forceinline__ void products(float (&scores)[ROW_TILES][KEY_TILES][8], const unsigned short* keys, int lane) const {
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
      for (int t = 0; t < KEY_TILES; t++)
#pragma unroll
        for (int e = 0; e < 8; e++) scores[r][t][e] = 0.0f;
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
      unsigned a[ROW_TILES][2];
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++) {
        if (Q_IN_REGISTERS) {
          a[r][0] = q[r][k][0];
          a[r][1] = q[r][k][1];
        } else {
          load_pair(a[r], q_tile + (16 * r + a_row(lane)) * ROW + 4 * k);
        }
      }
#pragma unroll
      for (int t = 0; t < KEY_TILES; t++) {
        unsigned key[2];
        load_pair(key, keys + (16 * t + b_key(lane)) * ROW + 4 * k);
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) MMA(false, scores[r][t], a[r], key);
      }
    }
  }

  static __device__ __forceinline__ void store_weights(const float (&weights)[KEY_TILES][8], unsigned short* tile, int lane) {
#pragma unroll
    for (int t = 0; t < KEY_TILES; t++)
#pragma unroll
      for (int v1 = 0; v1 < 2; v1++) {
        const float* w = weights[t] + 2 * v1;
        const unsigned first = pack_halves(w[0], w[1]), second = pack_halves(w[4], w[5]);
        store_pair(tile + sum_row(lane, v1) * Memory::WEIGHT_ROW + weight_position(lane, t), first, second);
      }
  }

  __device__ __forceinline__ void add_values(const Memory& memory, int lane) {
#pragma unroll
    for (int k = 0; k < KEYS / 4; k++) {
      unsigned weights[ROW_TILES][2];
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++)
        load_pair(weights[r], memory.weights + r * Memory::WEIGHTS + a_row(lane) * Memory::WEIGHT_ROW + 4 * k);
      const unsigned short* value_row = memory.values + key_at(lane, k) * ROW + b_feature(lane);
#pragma unroll
      for (int f = 0; f < FEATURE_TILES; f++) {
        unsigned value[2];
        load_pair(value, value_row + 16 * f);
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) MMA(true, out[r][f], weights[r], value);
      }
    }
  }

  // A weight of 0 times NaN would be NaN in rows that do not see the key: its values were zeroed, and the rows that do see it are marked.
  __device__ __forceinline__ void spoil(const Row (&rows)[ROW_TILES][2], const unsigned* bad, int key) {
    for (int word = 0; word < BAD_WORDS; word++) {
      for (unsigned left = bad[word]; left; left &= left - 1) {
        const int at = key + 32 * word + __ffs(int(left)) - 1;
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
          for (int v1 = 0; v1 < 2; v1++) spoiled |= unsigned(at >= rows[r][v1].first && at < rows[r][v1].last) << (2 * r + v1);
      }
    }
  }
};
