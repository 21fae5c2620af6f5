// Small kernels for tests/test_simt.py: what the executor must run rightly, and faults that it must name.
#define ALL 0xffffffffu

extern "C" __global__ void __launch_bounds__(256) reverse(float* out, const float* in, int stride, int synchronise) {
  extern __shared__ __align__(16) float tile[];
  const int t = threadIdx.x, n = blockDim.x;
  tile[t * stride] = in[blockIdx.x * n + t];
  if (synchronise == 1) __syncthreads();
  if (synchronise == 2) __syncwarp();
  out[blockIdx.x * n + t] = tile[(n - 1 - t) * stride];
}

extern "C" __global__ void warp_sums(float* out, const float* in, int fault) {
  __shared__ float sums[32];
  __shared__ int counts[3];
  const int t = threadIdx.x, lane = t & 31;
  float sum = in[t];
  if (fault == 1 && lane == 3) return;
  if (fault == 2 && lane < 16) sum += __shfl_xor_sync(ALL, sum, 1);
  else if (fault == 3) sum += __shfl_xor_sync(lane < 16 ? ALL : ~1u, sum, 1);
  else if (fault == 4 && t >= 32) __syncthreads();
  else if (fault == 5 && lane == 7) sum += __shfl_xor_sync(ALL & ~(1u << 7), sum, 1);
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
  if (lane == 0) sums[t / 32] = sum;
  if (fault != 6) __syncthreads();
  if (fault == 7 && t == 0) return;
  if (t == 0) counts[0] = __popc(__ballot_sync(1u, true));
  const int positive = __syncthreads_count(in[t] > 0);
  if (__syncthreads_or(in[t] > 100) || !__syncthreads_and(in[t] > -100)) return;
  float total = 0;
  for (unsigned w = 0; w < blockDim.x / 32; w++) total += sums[w];
  out[t] = __any_sync(ALL, lane == 5) && !__all_sync(ALL, lane == 5) ? total + 1000.0f * positive : -1.0f;
}

// Each thread loads or stores `width` bytes at `in + offset + lane * stride` (bytes), from global or by way of shared memory.
extern "C" __global__ void touch(unsigned char* out, const unsigned char* in, int width, int stride, int offset, int in_shared) {
  __shared__ __align__(16) unsigned char bytes[32768];
  const int at = offset + int(threadIdx.x) * stride;
  if (in_shared) {
    if (width == 1) bytes[at] = 1;
    if (width == 2) *reinterpret_cast<unsigned short*>(bytes + at) = 1;
    if (width == 4) *reinterpret_cast<unsigned*>(bytes + at) = 1;
    if (width == 8) *reinterpret_cast<uint2*>(bytes + at) = make_uint2(1, 2);
    if (width == 16) *reinterpret_cast<uint4*>(bytes + at) = make_uint4(1, 2, 3, 4);
  } else {
    if (width == 1) out[at] = in[at];
    if (width == 2) *reinterpret_cast<unsigned short*>(out + at) = *reinterpret_cast<const unsigned short*>(in + at);
    if (width == 4) *reinterpret_cast<unsigned*>(out + at) = *reinterpret_cast<const unsigned*>(in + at);
    if (width == 8) *reinterpret_cast<uint2*>(out + at) = *reinterpret_cast<const uint2*>(in + at);
    if (width == 16) *reinterpret_cast<uint4*>(out + at) = *reinterpret_cast<const uint4*>(in + at);
  }
}

// Rank `rank` of `ranks`: publish a value, wait for everybody's, add them up; again for each of `rounds`.
extern "C" __global__ void meet(int* values, int* flags, int* out, int rank, int ranks, int rounds, int missing) {
  const int t = threadIdx.x;
  for (int round = 1; round <= rounds; round++) {
    if (t == 0 && rank != missing) {
      values[rank + ranks * (round & 1)] = rank * 100 + round;
      simt::store_release(flags + rank, round);
    }
    int sum = 0;
    for (int other = 0; other < ranks; other++) {
      while (simt::load_acquire(flags + other) < round) {}
      sum += values[other + ranks * (round & 1)];
    }
    out[(rank * rounds + round - 1) * blockDim.x + t] = sum;
    __syncthreads();
  }
}

// Blocks of one launch wait for one another: a barrier over the grid.
extern "C" __global__ void grid_barrier(int* arrived, int* out) {
  if (threadIdx.x == 0) {
    atomicAdd(arrived, 1);
    while (simt::load_acquire(arrived) < int(gridDim.x)) __nanosleep(20);
  }
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = *arrived;
}

// [16 x 4] [4 x 16] of halves with one mma: lane fragments come laid out, sums go out as they lie.
extern "C" __global__ void one_mma(float* sums, const uint2* a, const uint2* b, int b_row) {
  const int lane = threadIdx.x;
  float held[8];
  for (int i = 0; i < 8; i++) held[i] = sums[lane * 8 + i];
  const unsigned a_pairs[2] = {a[lane].x, a[lane].y}, b_pairs[2] = {b[lane].x, b[lane].y};
  simt::mma_m8n8k4(b_row, held, a_pairs, b_pairs, __FILE__, __LINE__);
  for (int i = 0; i < 8; i++) sums[lane * 8 + i] = held[i];
}

extern "C" __global__ void convert(unsigned short* halves, float* floats, const float* in, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) halves[i] = simt::float_to_half(in[i]);
  if (i < 65536) floats[i] = simt::half_to_float((unsigned short)i);
}
