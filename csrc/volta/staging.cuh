// Rows of q, k or v from global memory through registers into padded rows of shared memory.
//
// Volta has no asynchronous copy: what hides the latency is that the loads of the next tile are issued before the present one is worked
// on, and stored after. A lane moves 16 bytes at a time where the tensor's alignment allows; two 8-byte stores put them down, because a
// padded row is a multiple of 8 bytes only. Sixteen lanes take four pieces of 16 bytes from each of the rows r, r+1, r+8, r+9: those four
// rows start 0, 2, 16, 18 words apart mod 32 (or 0, 18, 16, 2), so that the stores meet no bank twice.
#pragma once
#include "call.h"
#include "fragments.cuh"
#include "numbers.cuh"

constexpr int ROW = HEAD_DIM + PAD;                    // halves from one row of a tile to the next
static_assert(HEAD_DIM % 32 == 0, "a row of a tile has to take 2 mod 16 words");

// Where the rows of one head of one sequence lie.
struct Rows {
  const unsigned short* base;
  long long token_stride, page_stride;
  const int* pages;                                    // null: not paged
  int page_size, feature_stride, features;
  bool vector;

  __device__ __forceinline__ const unsigned short* row(int token) const {
    if (!pages) return base + token * token_stride;
    const int page = token / page_size;
    return base + pages[page] * page_stride + (token - page * page_size) * token_stride;
  }
};

// The rows of one head, from the sequence's first token on. head: of q, or of k and v.
static __device__ __forceinline__ Rows rows_of_head(const Call& call, const unsigned short* base, const long long (&stride)[4],
                                                    int features, int vector, long long first_token, int b, int head) {
  const long long sequence = call.cu_q ? 0 : b * stride[0];                   // packed sequences have no batch axis
  const int* pages = call.table ? call.table + b * call.table_stride : nullptr;
  return {base + sequence + head * stride[1] + first_token * stride[2], stride[2], stride[0], pages, call.page_size, int(stride[3]),
          features, vector != 0};
}

// FEATURES features of ROWS rows, moved by THREADS threads.
template <int ROWS, int FEATURES, int THREADS>
struct Staged {
  static constexpr int PIECES = ROWS * FEATURES / 8 / THREADS;
  static_assert(PIECES * THREADS * 8 == ROWS * FEATURES && ROWS % 16 == 0 && FEATURES % 32 == 0, "the threads share the rows evenly");
  uint4 piece[PIECES];

  static __device__ __forceinline__ void place(int thread, int i, int& row, int& feature) {
    const int sixteen = (i * THREADS + thread) / 16, groups = FEATURES / 32;            // sixteen lanes and what they take
    row = sixteen / (4 * groups) * 16 + 8 * bit(thread, 3) + sixteen / groups % 4 * 2 + bit(thread, 2);
    feature = sixteen % groups * 32 + 8 * (thread & 3);
  }

  // tokens first .. end of `rows`, features from first_feature on; zeros from `end` on, and beyond the last feature
  __device__ __forceinline__ void load(const Rows& rows, int first, int end, int first_feature, int thread) {
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      int row, feature;
      place(thread, i, row, feature);
      feature += first_feature;
      uint4 found = make_uint4(0, 0, 0, 0);
      if (first + row < end && feature < rows.features) {
        const unsigned short* from = rows.row(first + row);
        if (rows.vector) found = *reinterpret_cast<const uint4*>(from + feature);
        else found = gather(from, rows.feature_stride, feature, rows.features);
      }
      piece[i] = found;
    }
  }

  // tile: its first feature that is staged
  __device__ __forceinline__ void store(unsigned short* tile, int thread) const {
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      int row, feature;
      place(thread, i, row, feature);
      store_pair(tile + row * ROW + feature, piece[i].x, piece[i].y);
      store_pair(tile + row * ROW + feature + 4, piece[i].z, piece[i].w);
    }
  }

  // store(), with zeros for what is Inf or NaN; a bit of `bad` for each row that had any.
  __device__ __forceinline__ void store_finite(unsigned short* tile, unsigned* bad, int thread) {
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      uint4& p = piece[i];
      if (!any_not_finite(p.x) && !any_not_finite(p.y) && !any_not_finite(p.z) && !any_not_finite(p.w)) continue;
      int row, feature;
      place(thread, i, row, feature);
      atomicOr(bad + row / 32, 1u << row % 32);
      p.x = finite(p.x);
      p.y = finite(p.y);
      p.z = finite(p.z);
      p.w = finite(p.w);
    }
    store(tile, thread);
  }

 private:
  static __device__ __noinline__ uint4 gather(const unsigned short* from, int stride, int feature, int features) {
    unsigned words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (feature + j < features) words[j / 2] |= unsigned(from[(long long)(feature + j) * stride]) << 16 * (j % 2);
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
  static __device__ __forceinline__ unsigned finite(unsigned pair) {
    if ((pair & 0x7c00u) == 0x7c00u) pair &= 0xffff0000u;
    if ((pair & 0x7c000000u) == 0x7c000000u) pair &= 0xffffu;
    return pair;
  }
};
