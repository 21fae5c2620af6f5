// All-reduce, reduce-scatter and all-gather in symmetric memory, by the same doors as the fused kernel, and a one-shot form for short ones.
//
// hopper_all_reduce       in place: each rank sums its own units and writes them to all (two-shot)
// hopper_reduce_scatter   x is only read; the sum of the own units goes to memory of this rank
// hopper_all_gather       `count` vectors of 16 bytes of this rank's own memory go to vector `first` of every rank's result
// hopper_one_shot         each rank puts its x into a staging buffer, meets the others once, and sums all of everyone's. No second meeting:
//                         the two staging buffers take turns, and a rank that is one call ahead writes into the other one. Its CTAs have
//                         channels of their own and are always as many, so that all of them are at the same turn.
// Grid and block: backends/hetero_attn_hopper/plan.py.
#include "door.cuh"

extern "C" __global__ void __launch_bounds__(1024, 1) hopper_all_reduce(const Call call) {
  __shared__ Meeting told;
  unsigned epoch;
  if (!begins(call, blockIdx.x, epoch) || !meet(call, blockIdx.x, ++epoch, 1, told)) return;
  const bool alike = at_one_offset(call, told);
  const long long step = (long long)gridDim.x * blockDim.x;
#if defined(MULTIMEM)
  if (alike) {                         // as vectors, whatever they hold: the switch sums and rounds them
    const long long vectors = VECTORS * call.count;
    for (long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x; at < vectors; at += AHEAD * step) {
      Vector sums[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; i++)
        if (at + i * step < vectors) sums[i] = multimem_sum(call, told.offset[0] + 16 * (VECTORS * call.first + at + i * step));
#pragma unroll
      for (int i = 0; i < AHEAD; i++)
        if (at + i * step < vectors) multimem_store(call, told.offset[0] + 16 * (VECTORS * call.first + at + i * step), sums[i]);
    }
    if (meet(call, blockIdx.x, ++epoch, 2, told)) ends(call, blockIdx.x, epoch);
    return;
  }
#endif
  for (long long unit = (long long)blockIdx.x * blockDim.x + threadIdx.x; unit < call.count; unit += step)
    give_unit(call, told, alike, call.first + unit, sum_over_ranks(call, told, alike, call.first + unit));
  if (meet(call, blockIdx.x, ++epoch, 2, told)) ends(call, blockIdx.x, epoch);
}

extern "C" __global__ void __launch_bounds__(1024, 1) hopper_reduce_scatter(const Call call) {
  __shared__ Meeting told;
  unsigned epoch;
  if (!begins(call, blockIdx.x, epoch) || !meet(call, blockIdx.x, ++epoch, 1, told)) return;
  const bool alike = at_one_offset(call, told);
  const long long step = (long long)gridDim.x * blockDim.x;
  for (long long unit = (long long)blockIdx.x * blockDim.x + threadIdx.x; unit < call.count; unit += step)
    store_own(call.out, X_KIND, unit, sum_over_ranks(call, told, alike, call.first + unit));
  if (meet(call, blockIdx.x, ++epoch, 2, told)) ends(call, blockIdx.x, epoch);        // until then x may not be written again
}

extern "C" __global__ void __launch_bounds__(1024, 1) hopper_all_gather(const Call call) {
  __shared__ Meeting told;
  unsigned epoch;
  if (!begins(call, blockIdx.x, epoch) || !meet(call, blockIdx.x, ++epoch, 1, told)) return;     // every rank's result may be written
  const bool alike = at_one_offset(call, told);
  const long long step = (long long)gridDim.x * blockDim.x;
  for (long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x; at < call.count; at += AHEAD * step) {
    Vector own[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (at + i * step < call.count) own[i] = load_vector(reinterpret_cast<const uint4*>(call.source) + at + i * step);
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (at + i * step < call.count) give_to_ranks(call, told, alike, 16 * (call.first + at + i * step), own[i]);
  }
  if (meet(call, blockIdx.x, ++epoch, 2, told)) ends(call, blockIdx.x, epoch);
}

extern "C" __global__ void __launch_bounds__(1024, 1) hopper_one_shot(const Call call) {
  __shared__ Meeting told;
  unsigned epoch;
  const int channel = MAX_CTAS + blockIdx.x;
  if (!begins(call, channel, epoch)) return;
  epoch++;
  const unsigned long long turn = call.staging + (epoch & 1) * (16ull * VECTORS * call.staging_units);
  const long long units = (call.elements + UNIT - 1) / UNIT, step = (long long)gridDim.x * blockDim.x;
  const long long mine = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  for (long long unit = mine; unit < units; unit += step) {
    const Eight eight = load_part(call.source, X_KIND, unit, call.elements - unit * UNIT);
    for (int v = 0; v < VECTORS; v++)
      store_relaxed(call.buffer[call.rank] + turn + 16 * (unit * VECTORS + v), pack(eight, X_KIND, 4 * v));
  }
  if (!meet(call, channel, epoch, 1, told)) return;
  for (long long unit = mine; unit < units; unit += step) {
    Eight total = {}, part = {};
    for (int rank = 0; rank < call.world; rank++) {
      for (int v = 0; v < VECTORS; v++)
        unpack(load_relaxed(call.buffer[rank] + turn + 16 * (unit * VECTORS + v)), X_KIND, 4 * v, part);
      for (int i = 0; i < UNIT; i++) total.at[i] += part.at[i];
    }
    store_part(call.out, X_KIND, unit, call.elements - unit * UNIT, total);
  }
  ends(call, channel, epoch);
}
