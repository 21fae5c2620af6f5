// FlashAttention forward for Volta: a block takes 16 * ROW_TILES * WARPS queries of one head against a range of keys.
//
// After FastAttention (arXiv 2410.16663), Volta: m8n8k4 tensor cores, and a shared-memory layout without operand conversion and without
// bank conflicts in the main loop (fragments.cuh). Causal and window bounds skip whole tiles; only tiles that a bound cuts are masked.
// Compile-time: HEAD_DIM (padded, a multiple of 32), KEYS a tile, WARPS, ROW_TILES of 16 a warp, Q_IN_REGISTERS, ONE_BUFFER, PARTS, and
// BLOCKS that share a multiprocessor. tiling.py chooses them, with the shared-memory map: K, V tiles, weights of the warps, bad-key bits;
// Q lies over them until it is in registers, or after them.
// grid: (query tiles * splits, query heads, batch). Block: 32 * WARPS.
#include "attend.cuh"

constexpr int THREADS = 32 * WARPS, QUERIES = 16 * ROW_TILES * WARPS;
using Group = Attend<THREADS>;

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) volta_forward(const Call call) {
  extern __shared__ __align__(16) unsigned short shared_memory[];
  const int thread = int(threadIdx.x), lane = thread & 31, warp = thread >> 5;
  const int head = int(blockIdx.y), b = int(blockIdx.z) + call.first_batch, kv_head = head / (call.q_heads / call.kv_heads);
  const int tiles = (call.q_len + QUERIES - 1) / QUERIES, split = int(blockIdx.x) / tiles;
  const int tile = tiles - 1 - int(blockIdx.x) % tiles;        // under causality the last tiles have most to do: they start first
  const Sequence s = sequence_of(call, b);
  const int query = tile * QUERIES;
  if (query >= s.q_len) return;

  // keys that any, and that every, query of the block sees
  const int last_query = min(query + QUERIES, s.q_len) - 1;
  int first, end, whole_first, whole_last;
  range_of(call, s, query, first, whole_last);
  range_of(call, s, last_query, whole_first, end);
  if (call.splits > 1) {                               // an equal share of whole tiles
    const int share = (max(end - first, 0) + call.splits * KEYS - 1) / (call.splits * KEYS) * KEYS;
    first += split * share;
    end = min(end, first + share);
  }

  constexpr int BAD_AT = Memory::WEIGHTS_AT + WARPS * ROW_TILES * Memory::WEIGHTS, TILES_END = BAD_AT + 4 * Group::BAD_WORDS;
  Memory memory;
  memory.keys = shared_memory;
  memory.values = shared_memory + Memory::VALUES_AT;
  memory.weights = shared_memory + Memory::WEIGHTS_AT + warp * ROW_TILES * Memory::WEIGHTS;
  memory.bad = reinterpret_cast<unsigned*>(shared_memory + BAD_AT);
  unsigned short* q_tile = shared_memory + (Q_IN_REGISTERS ? 0 : TILES_END);

  const bool dense = !call.cu_q;
  Rows queries = rows_of_head(call, call.q, call.q_stride, call.head_dim, call.vector_q, s.q_start, b, head);
  queries.pages = nullptr;
  const Rows keys = rows_of_head(call, call.k, call.k_stride, call.head_dim, call.vector_k, s.k_start, b, kv_head);
  const Rows values = rows_of_head(call, call.v, call.v_stride, call.v_head_dim, call.vector_v, s.k_start, b, kv_head);

#pragma unroll
  for (int part = 0; part < QUERIES; part += 32) {     // a few registers at a time: nothing else is there to hide the latency yet
    Staged<32, HEAD_DIM, THREADS> staged;
    staged.load(queries, query + part, s.q_len, 0, thread);
    staged.store(q_tile + part * ROW, thread);
  }
  __syncthreads();
  Group group;
  group.begin(q_tile + warp * 16 * ROW_TILES * ROW, lane);
  if (Q_IN_REGISTERS) __syncthreads();                 // the tiles come where the queries were

  Row rows[ROW_TILES][2];
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
    for (int v1 = 0; v1 < 2; v1++) rows[r][v1] = row_of(call, s, b, query + (warp * ROW_TILES + r) * 16 + sum_row(lane, v1), head);
  group.run(call, s, rows, b, keys, values, memory, first, KEYS, end, whole_first, whole_last, thread);

#pragma unroll
  for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
    for (int v1 = 0; v1 < 2; v1++) {
      const Row& row = rows[r][v1];
      const bool real = row.query < s.q_len;
      float factor, lse;
      close_row(call, head, call.splits == 1, group.maximum[r][v1], group.sum[r][v1], factor, lse);
      if (bit(int(group.spoiled), 2 * r + v1)) factor = __int_as_float(0x7fffffff);
      const long long token = s.q_start + row.query;
      if (call.splits > 1) {
        const long long index = ((long long)split * call.q_heads + head) * call.total_q + (dense ? b * call.q_len : 0) + token;
        if (real && (lane & 10) == 0) store_partial(call, index, group.maximum[r][v1], group.sum[r][v1]);
#pragma unroll
        for (int f = 0; f < Group::FEATURE_TILES; f++)
#pragma unroll
          for (int v = 0; v < 4; v++) {
            const int e = (v & 1) + 2 * v1 + 4 * (v >> 1);
            if (real) call.partial_out[index * HEAD_DIM + 16 * f + sum_column(lane, e)] = group.out[r][f][e] * factor;
          }
        continue;
      }
      if (real && call.lse && (lane & 10) == 0) call.lse[b * call.lse_stride[0] + head * call.lse_stride[1] + token] = lse;
      unsigned short* to = call.out + b * call.out_stride[0] + head * call.out_stride[1] + token * call.out_stride[2];
      // a lane has features (0 1 4 5) or (2 3 6 7) of eight: it trades a pair with its neighbour, and both have four side by side
      const bool upper = bit(lane, 1);
#pragma unroll
      for (int f = 0; f < Group::FEATURE_TILES; f++) {
        const float* o = group.out[r][f] + 2 * v1;
        const unsigned low = pack_halves(o[0] * factor, o[1] * factor), high = pack_halves(o[4] * factor, o[5] * factor);
        const unsigned traded = __shfl_xor_sync(0xffffffffu, upper ? low : high, 2);
        const unsigned pairs[2] = {upper ? traded : low, upper ? high : traded};
        const int feature = 16 * f + 8 * bit(lane, 3) + 4 * bit(lane, 1);
        if (!real || feature >= call.v_head_dim) continue;
        if (call.vector_out) {
          *reinterpret_cast<uint2*>(to + feature) = make_uint2(pairs[0], pairs[1]);
        } else {
#pragma unroll
          for (int j = 0; j < 4; j++)
            if (feature + j < call.v_head_dim) to[(feature + j) * call.out_stride[3]] = (unsigned short)(pairs[j / 2] >> 16 * (j % 2));
        }
      }
    }
}
