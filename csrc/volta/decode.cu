// Few queries against many keys: rows are the queries of all heads that share a KV head, keys are cut among warps and among blocks.
//
// Decoding is bound by reading K and V, so each is read once for a whole group of heads (rows = query * group + head in group, 16 a block),
// and a sequence is split over as many blocks as fill the device. A warp works alone on every fourth tile, without block barriers; the four
// are merged at the end, and combine.cu merges the splits.
// Compile-time: as forward.cu, with ROW_TILES 1. Shared memory: per warp its tiles, weights and bad-key bits; Q after them all. At the
// end the sums of the warps lie over it.
// grid: (row tiles * splits, KV heads, batch). Block: 32 * WARPS.
#include "attend.cuh"

using Group = Attend<32>;
static_assert(ROW_TILES == 1, "a block has 16 rows");

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) volta_decode(const Call call) {
  extern __shared__ __align__(16) unsigned short shared_memory[];
  const int thread = int(threadIdx.x), lane = thread & 31, warp = thread >> 5;
  const int kv_head = int(blockIdx.y), b = int(blockIdx.z) + call.first_batch, group_size = call.q_heads / call.kv_heads;
  const int tiles = (call.q_len * group_size + 15) / 16, split = int(blockIdx.x) / tiles, first_row = int(blockIdx.x) % tiles * 16;
  const Sequence s = sequence_of(call, b);
  if (first_row >= s.q_len * group_size) return;
  const int last_row = min(first_row + 16, s.q_len * group_size) - 1;
  int first, end, whole_first, whole_last;
  range_of(call, s, first_row / group_size, first, whole_last);
  range_of(call, s, last_row / group_size, whole_first, end);
  const int share = (max(end - first, 0) + call.splits * KEYS - 1) / (call.splits * KEYS) * KEYS;
  first += split * share;
  end = min(end, first + share);

  constexpr int BAD_AT = Memory::WEIGHTS_AT + Memory::WEIGHTS, WARP_END = BAD_AT + 4 * Group::BAD_WORDS;
  unsigned short* own = shared_memory + warp * WARP_END;
  Memory memory;
  memory.keys = own;
  memory.values = own + Memory::VALUES_AT;
  memory.weights = own + Memory::WEIGHTS_AT;
  memory.bad = reinterpret_cast<unsigned*>(own + BAD_AT);
  unsigned short* q_tile = shared_memory + WARPS * WARP_END;

  const bool dense = !call.cu_q;
  const Rows keys = rows_of_head(call, call.k, call.k_stride, call.head_dim, call.vector_k, s.k_start, b, kv_head);
  const Rows values = rows_of_head(call, call.v, call.v_stride, call.v_head_dim, call.vector_v, s.k_start, b, kv_head);

  for (int at = thread; at < 16 * HEAD_DIM; at += 32 * WARPS) {
    const int row = at / HEAD_DIM, feature = at % HEAD_DIM, query = (first_row + row) / group_size;
    unsigned short found = 0;
    if (first_row + row <= last_row && feature < call.head_dim)
      found = call.q[(dense ? b * call.q_stride[0] : 0) + (kv_head * group_size + (first_row + row) % group_size) * call.q_stride[1] +
                     (s.q_start + query) * call.q_stride[2] + feature * call.q_stride[3]];
    q_tile[row * ROW + feature] = found;
  }
  __syncthreads();
  Group group;
  group.begin(q_tile, lane);
  Row rows[1][2];
#pragma unroll
  for (int v1 = 0; v1 < 2; v1++) {
    const int row = first_row + sum_row(lane, v1);
    rows[0][v1] = row_of(call, s, b, row <= last_row ? row / group_size : s.q_len, kv_head * group_size + row % group_size);
  }
  group.run(call, s, rows, b, keys, values, memory, first + warp * KEYS, WARPS * KEYS, end, whole_first, whole_last, lane);

  // the warps become one: maxima and sums [WARPS][16] each, then the sums of values [16][HEAD_DIM]
  __syncthreads();
  float* maxima = reinterpret_cast<float*>(shared_memory);
  float *sums = maxima + 16 * WARPS, *spoiled = sums + 16 * WARPS, *total = spoiled + 16 * WARPS;
#pragma unroll
  for (int v1 = 0; v1 < 2; v1++)
    if ((lane & 10) == 0) {
      const int at = warp * 16 + sum_row(lane, v1);
      maxima[at] = group.maximum[0][v1];
      sums[at] = group.sum[0][v1];
      spoiled[at] = bit(int(group.spoiled), v1) ? 1.0f : 0.0f;
    }
  __syncthreads();
  for (int turn = 0; turn < WARPS; turn++) {
    if (warp == turn) {
#pragma unroll
      for (int v1 = 0; v1 < 2; v1++) {
        const int row = sum_row(lane, v1);
        float highest = -INFINITY_F;
        for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, maxima[w * 16 + row]);
        const float share_of_warp = group.maximum[0][v1] == -INFINITY_F ? 0.0f : power_of_2((group.maximum[0][v1] - highest) * LOG2_E);
#pragma unroll
        for (int f = 0; f < Group::FEATURE_TILES; f++)
#pragma unroll
          for (int v = 0; v < 4; v++) {
            const int e = (v & 1) + 2 * v1 + 4 * (v >> 1), at = row * (HEAD_DIM + 8) + 16 * f + sum_column(lane, e);
            total[at] = (turn ? total[at] : 0.0f) + group.out[0][f][e] * share_of_warp;
          }
      }
    }
    __syncthreads();
  }

  for (int row = warp; first_row + row <= last_row; row += WARPS) {
    float highest = -INFINITY_F, sum = 0.0f, factor, lse, spoil = 0.0f;
    for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, maxima[w * 16 + row]);
    for (int w = 0; w < WARPS; w++) {
      if (sums[w * 16 + row] != 0.0f) sum += sums[w * 16 + row] * power_of_2((maxima[w * 16 + row] - highest) * LOG2_E);
      spoil += spoiled[w * 16 + row];
    }
    const int head = kv_head * group_size + (first_row + row) % group_size;
    const long long token = s.q_start + (first_row + row) / group_size;
    close_row(call, head, call.splits == 1, highest, sum, factor, lse);
    if (spoil > 0.0f) factor = __int_as_float(0x7fffffff);
    if (call.splits > 1) {
      const long long index = ((long long)split * call.q_heads + head) * call.total_q + (dense ? b * call.q_len : 0) + token;
      if (lane == 0) store_partial(call, index, highest, sum);
      for (int feature = lane; feature < HEAD_DIM; feature += 32)
        call.partial_out[index * HEAD_DIM + feature] = total[row * (HEAD_DIM + 8) + feature] * factor;
    } else {
      if (call.lse && lane == 0) call.lse[b * call.lse_stride[0] + head * call.lse_stride[1] + token] = lse;
      unsigned short* to = call.out + b * call.out_stride[0] + head * call.out_stride[1] + token * call.out_stride[2];
      for (int feature = lane; feature < call.v_head_dim; feature += 32)
        to[feature * call.out_stride[3]] = (unsigned short)pack_halves(total[row * (HEAD_DIM + 8) + feature] * factor, 0.0f);
    }
  }
}
