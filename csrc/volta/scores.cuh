// From products to weights: scale, softcap, bias, mask, who sees whom, and the running softmax of a row.
//
// Scores stay in natural units: a float mask of finfo.min must stay a number, and times log2(e) it would not. Each lane holds two rows of a
// 16-row tile (fragments.cuh); a row is shared by the four lanes that differ in bits 1 and 3.
#pragma once
#include "call.h"
#include "fragments.cuh"
#include "numbers.cuh"

// One sequence of the batch.
struct Sequence {
  int q_len, kv_len;
  long long q_start, k_start;                          // first token
};

static __device__ __forceinline__ Sequence sequence_of(const Call& call, int b) {
  if (!call.cu_q) return {call.q_len, call.kv_len, 0, 0};
  const int q_start = call.cu_q[b], q_len = call.cu_q[b + 1] - q_start;
  if (call.lengths) return {q_len, call.lengths[b], q_start, 0};
  return {q_len, call.cu_k[b + 1] - call.cu_k[b], q_start, call.cu_k[b]};
}

// What a row of scores is: its query, and the keys [first, last) that length, causality and window leave it.
struct Row {
  int query, head, first, last;
  float slope;
};

static __device__ __forceinline__ void range_of(const Call& call, const Sequence& s, int query, int& first, int& last) {
  const int position = query + s.kv_len - s.q_len;
  first = call.left >= 0 ? max(0, position - call.left) : 0;
  last = call.right >= 0 ? min(s.kv_len, position + call.right + 1) : s.kv_len;
}

// The row of a query that may not be one of the sequence's (then it sees nothing).
static __device__ __forceinline__ Row row_of(const Call& call, const Sequence& s, int b, int query, int head) {
  Row row = {query, head, 0, 0, 0.0f};
  if (query < s.q_len) {
    range_of(call, s, query, row.first, row.last);
    if (call.slopes) row.slope = call.slopes[b * call.slopes_stride[0] + head * call.slopes_stride[1]];
  }
  return row;
}

// scores [TILES][8] of keys first_key ...: products in, logits out; -inf for keys that a row does not see.
// whole: every row sees every one of these keys, but for a mask.
template <int TILES>
static __device__ __forceinline__ void finish_scores(float (&scores)[TILES][8], const Call& call, const Sequence& s, const Row (&rows)[2],
                                                     int b, int first_key, bool whole, int lane) {
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int e = 0; e < 8; e++) scores[t][e] *= call.scale;
  if (call.softcap > 0.0f) {
    const float inverse = 1.0f / call.softcap;
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int e = 0; e < 8; e++) scores[t][e] = call.softcap * tanhf(scores[t][e] * inverse);
  }
  if (call.slopes) {
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const Row& row = rows[bit(e, 1)];
        const int distance = row.query + s.kv_len - s.q_len - (first_key + 16 * t + sum_column(lane, e));
        scores[t][e] -= row.slope * float(distance < 0 ? -distance : distance);
      }
  }
  if (call.mask_kind) {
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const Row& row = rows[bit(e, 1)];
        const int key = first_key + 16 * t + sum_column(lane, e);
        if (key < row.first || key >= row.last) continue;
        const long long* stride = call.mask_stride;
        const long long at = b * stride[0] + row.head * stride[1] + row.query * stride[2] + key * stride[3];
        if (call.mask_kind == MASK_BOOL) scores[t][e] = static_cast<const unsigned char*>(call.mask)[at] ? scores[t][e] : -INFINITY_F;
        else if (call.mask_kind == MASK_HALF) scores[t][e] += half_to_float(static_cast<const unsigned short*>(call.mask)[at]);
        else scores[t][e] += static_cast<const float*>(call.mask)[at];
      }
  }
  if (whole) return;
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const Row& row = rows[bit(e, 1)];
      const int key = first_key + 16 * t + sum_column(lane, e);
      if (key < row.first || key >= row.last) scores[t][e] = -INFINITY_F;
    }
}

// Over the four lanes that share a row.
static __device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 8));
}
static __device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 2);
  return x + __shfl_xor_sync(0xffffffffu, x, 8);
}

// Logits -> weights under the row's running maximum; returns what earlier sums must be multiplied by. v1: which of the lane's rows.
template <int TILES>
static __device__ __forceinline__ float update_row(float (&scores)[TILES][8], int v1, float& maximum, float& sum) {
  float highest = maximum;
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int e = 0; e < 8; e++)
      if (bit(e, 1) == v1) highest = fmaxf(highest, scores[t][e]);
  highest = row_max(highest);
  const float base = highest == -INFINITY_F ? 0.0f : highest;                  // a row that saw nothing yet: weights of 0, not NaN
  const float rescale = power_of_2((maximum - base) * LOG2_E);
  float added = 0.0f;
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int e = 0; e < 8; e++)
      if (bit(e, 1) == v1) {
        scores[t][e] = power_of_2((scores[t][e] - base) * LOG2_E);
        added += scores[t][e];
      }
  sum = sum * rescale + row_sum(added);
  maximum = highest;
  return rescale;
}

// A row's last step: its sink joins (once, with the last split), and what remains is to multiply the sums by `factor` and to write `lse`.
static __device__ __forceinline__ void close_row(const Call& call, int head, bool with_sink, float maximum, float sum, float& factor,
                                                 float& lse) {
  float total = sum, base = maximum;
  if (with_sink && call.sinks) {
    const float sink = call.sinks[head];
    base = fmaxf(maximum, sink);
    const float shift = base == -INFINITY_F ? 0.0f : base;
    total = sum * power_of_2((maximum - shift) * LOG2_E) + power_of_2((sink - shift) * LOG2_E);
    factor = sum > 0.0f ? power_of_2((maximum - shift) * LOG2_E) / total : 0.0f;
  } else {
    factor = sum > 0.0f ? 1.0f / total : 0.0f;
  }
  lse = total > 0.0f ? base + logf(total) : -INFINITY_F;
  if (sum != sum || maximum != maximum) factor = lse = sum + maximum;          // NaN that a row does see stays NaN
}

// What a split knows of a row besides its (normalised) output. The sum is kept apart from the maximum: under a mask of finfo.min their
// logarithm's sum would round to the maximum.
static __device__ __forceinline__ void store_partial(const Call& call, long long index, float maximum, float sum) {
  call.partial_rows[2 * index] = maximum;
  call.partial_rows[2 * index + 1] = sum;
}
