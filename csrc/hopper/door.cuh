// One unit of the ranks' tensors: summed over them, or written to all of them, by the door that the build has.
//
// MULTIMEM: the switch sums and broadcasts, where every rank's tensor lies at the same offset of its symmetric memory. Without it, and where
// the offsets differ (a rank whose heap is fuller), a loop over the peers' pointers. Both sum in fp32 and round once to the format. The loop
// sums in rank order: the same bits on every run. In which order the switch sums is the switch's: each sum is made once and given to all
// ranks, so they hold the same bits, but that the next run gives the same ones nobody has promised or tried.
#pragma once
#include "barrier.cuh"

constexpr int VECTORS = X_BYTES * UNIT / 16;          // 16-byte vectors of a unit
constexpr int PEERS = 4 / VECTORS;                    // whose units are loaded at once: 16 registers
constexpr int AHEAD = 4;                              // 16-byte vectors that a thread has under way at once where it only moves them

static __device__ __forceinline__ bool at_one_offset(const Call& call, const Meeting& told) {
  bool alike = true;
  for (int rank = 1; rank < call.world; rank++) alike = alike && told.offset[rank] == told.offset[0];
  return alike;
}

// [UNIT] of the sum over the ranks, as the format holds it.
static __device__ __forceinline__ Eight sum_over_ranks(const Call& call, const Meeting& told, bool alike, long long unit) {
  Eight total = {};
  const unsigned long long at = unit * (16 * VECTORS);
#if defined(MULTIMEM)
  if (alike) {
    for (int v = 0; v < VECTORS; v++) unpack(multimem_sum(call, told.offset[0] + at + 16 * v), X_KIND, 4 * v, total);
    return total;
  }
#endif
  for (int begin = 0; begin < call.world; begin += PEERS) {      // several peers' loads are under way before the first is waited for
    Vector got[PEERS * VECTORS];
#pragma unroll
    for (int peer = 0; peer < PEERS; peer++) {
      if (begin + peer >= call.world) continue;
      for (int v = 0; v < VECTORS; v++) got[peer * VECTORS + v] = load_relaxed(told.tensor[begin + peer] + at + 16 * v);
    }
#pragma unroll
    for (int peer = 0; peer < PEERS; peer++) {
      if (begin + peer >= call.world) continue;
      Eight part = {};
      for (int v = 0; v < VECTORS; v++) unpack(got[peer * VECTORS + v], X_KIND, 4 * v, part);
      for (int i = 0; i < UNIT; i++) total.at[i] += part.at[i];
    }
  }
  for (int i = 0; i < UNIT; i++) total.at[i] = rounded(total.at[i], X_KIND);
  return total;
}

// Write 16 bytes at byte `at` of every rank's tensor.
static __device__ __forceinline__ void give_to_ranks(const Call& call, const Meeting& told, bool alike, unsigned long long at,
                                                     const Vector& vector) {
#if defined(MULTIMEM)
  if (alike) return multimem_store(call, told.offset[0] + at, vector);
#endif
  for (int step = 0; step < call.world; step++) {      // each rank begins with another peer, or all would write to one at a time
    const int rank = (call.rank + step) % call.world;
    store_relaxed(told.tensor[rank] + at, vector);
  }
}
static __device__ __forceinline__ void give_unit(const Call& call, const Meeting& told, bool alike, long long unit, const Eight& eight) {
  for (int v = 0; v < VECTORS; v++) give_to_ranks(call, told, alike, unit * (16 * VECTORS) + 16 * v, pack(eight, X_KIND, 4 * v));
}
