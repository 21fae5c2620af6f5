// TokenWeave's fused step (arXiv 2505.11329): reduce-scatter of rows, residual add, RMSNorm of the own rows, all-gather, in one kernel and in
// place, in the symmetric buffer that the row-parallel product was written into. Each rank norms 1/world of the rows, and a few CTAs do it
// while the others compute. Definition: Communicator.all_reduce_rms_norm and hetero_attn/norm.py, order of rounding included.
//
// A CTA takes one row at a time; the row is held in shared memory as fp32 (a thread reads back only what it wrote itself):
//   row [hidden] fp32 (dynamic)          sums [32] fp32, Meeting (static)
// Grid: 2 to 32 CTAs; the same number on every rank, for CTA b waits for CTA b. Planning: backends/hetero_attn_hopper/plan.py.
#include "door.cuh"

extern __shared__ float row[];

// The sum over the block, on every thread.
static __device__ float block_sum(float value, float* sums) {
  for (int lanes = 16; lanes; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  if (lane == 0) sums[warp] = value;
  __syncthreads();
  value = lane < warps ? sums[lane] : 0.0f;
  for (int lanes = 16; lanes; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  __syncthreads();                     // the sums may be written again
  return value;
}

// y / rms * weight in the family's order of rounding; kind: the format that y is in.
static __device__ __forceinline__ float scaled(float y, float inverse, float weight, int kind, const Call& call) {
  if (call.weight_offset != 0.0f) return rounded(y * inverse * (weight + call.weight_offset), kind);
  return rounded(rounded(y * inverse, kind) * weight, kind);
}

extern "C" __global__ void __launch_bounds__(1024, 1) hopper_all_reduce_rms_norm(const Call call) {
  __shared__ float sums[32];
  __shared__ Meeting told;
  unsigned epoch;
  const int channel = blockIdx.x, units = call.hidden / UNIT;
  if (!begins(call, channel, epoch) || !meet(call, channel, ++epoch, 1, told)) return;
  const bool alike = at_one_offset(call, told);
  for (long long own = blockIdx.x; own < call.count; own += gridDim.x) {
    const long long in_x = (call.first + own) * units, in_shard = own * units;
    float squares = 0.0f;
    for (int unit = threadIdx.x; unit < units; unit += blockDim.x) {
      Eight y = sum_over_ranks(call, told, alike, in_x + unit);
      if (call.post_weight) {
        for (int i = 0; i < UNIT; i++) {
          squares += y.at[i] * y.at[i];
          row[unit * UNIT + i] = y.at[i];
        }
        continue;
      }
      const Eight before = load_own(call.residual, call.residual_kind, in_shard + unit);
      for (int i = 0; i < UNIT; i++) {
        y.at[i] = rounded(before.at[i] + y.at[i], call.residual_kind);
        squares += y.at[i] * y.at[i];
        row[unit * UNIT + i] = y.at[i];
      }
      store_own(call.residual, call.residual_kind, in_shard + unit, y);
    }
    if (call.post_weight) {            // Gemma 2: the sum is normed before it is added
      const float inverse = rsqrtf(block_sum(squares, sums) / call.hidden + call.eps);
      squares = 0.0f;
      for (int unit = threadIdx.x; unit < units; unit += blockDim.x) {
        const Eight weight = load_own(call.post_weight, call.weight_kind, unit);
        Eight y = load_own(call.residual, call.residual_kind, in_shard + unit);
        for (int i = 0; i < UNIT; i++) {
          const float normed = scaled(row[unit * UNIT + i], inverse, weight.at[i], X_KIND, call);
          y.at[i] = rounded(y.at[i] + normed, call.residual_kind);
          squares += y.at[i] * y.at[i];
          row[unit * UNIT + i] = y.at[i];
        }
        store_own(call.residual, call.residual_kind, in_shard + unit, y);
      }
    }
    const float inverse = rsqrtf(block_sum(squares, sums) / call.hidden + call.eps);
    for (int unit = threadIdx.x; unit < units; unit += blockDim.x) {
      const Eight weight = load_own(call.weight, call.weight_kind, unit);
      Eight normed;
      for (int i = 0; i < UNIT; i++) normed.at[i] = scaled(row[unit * UNIT + i], inverse, weight.at[i], call.residual_kind, call);
      give_unit(call, told, alike, in_x + unit, normed);
    }
  }
  if (meet(call, channel, ++epoch, 2, told)) ends(call, channel, epoch);
}
