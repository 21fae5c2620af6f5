// Partial results of the splits of a row become one: out = sum of w_i out_i / sum of w_i with w_i = sum_i exp(max_i - max), and the sink
// joins here.
//
// A warp takes a row. The parts are added in the order of the splits, so that the same call gives the same bits.
// grid: (rows / 4 rounded up), rows = query heads * tokens. Block: 128.
#include "scores.cuh"

// A part's share of its row, under the row's maximum; NaN stays NaN.
static __device__ __forceinline__ float weight(const Call& call, long long index, float highest) {
  const float maximum = call.partial_rows[2 * index], sum = call.partial_rows[2 * index + 1];
  return maximum == -INFINITY_F && sum == 0.0f ? 0.0f : sum * power_of_2((maximum - highest) * LOG2_E);
}

extern "C" __global__ void __launch_bounds__(128) volta_combine(const Call call) {
  const int lane = int(threadIdx.x) & 31;
  const long long rows = (long long)call.q_heads * call.total_q, row = (long long)blockIdx.x * 4 + (int(threadIdx.x) >> 5);
  if (row >= rows) return;
  const int head = int(row / call.total_q);
  const long long token = row % call.total_q;
  float highest = -INFINITY_F, sum = 0.0f, factor, lse;
  for (int i = 0; i < call.splits; i++) highest = fmaxf(highest, call.partial_rows[2 * (i * rows + row)]);
  for (int i = 0; i < call.splits; i++) sum += weight(call, i * rows + row, highest);
  close_row(call, head, true, highest, sum, factor, lse);
  const bool dense = !call.cu_q;
  const long long b = dense ? token / call.q_len : 0, at = dense ? token % call.q_len : token;
  if (call.lse && lane == 0) call.lse[b * call.lse_stride[0] + head * call.lse_stride[1] + at] = lse;
  unsigned short* to = call.out + b * call.out_stride[0] + head * call.out_stride[1] + at * call.out_stride[2];
  for (int feature = lane; feature < call.v_head_dim; feature += 32) {
    float total = 0.0f;
    for (int i = 0; i < call.splits; i++) {
      const float share = weight(call, i * rows + row, highest);
      if (share != 0.0f) total += share * call.partial_out[(i * rows + row) * call.partial_dim + feature];
    }
    to[feature * call.out_stride[3]] = (unsigned short)pack_halves(total * factor, 0.0f);
  }
}
