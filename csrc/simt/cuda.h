// What a .cu finds in place of CUDA's headers when it is compiled for the CPU: keywords, index variables, vector types, intrinsics.
//
// The macro SIMT is defined. A .cu that needs inline PTX puts it behind a function with two bodies (csrc/volta/fragments.cuh); everything
// else is plain CUDA C++. Shared variables are thread_local, since a block stays on one thread of the system. Threads that spin on memory
// that another block or rank writes do it through load_acquire() or with a __nanosleep() in the loop: both let the others run.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "half.h"
#include "runtime.h"

#define SIMT 1
#define __global__ __attribute__((visibility("default")))
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static const
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ thread_local
#define __restrict__ __restrict

using dim3 = simt::Index;
#define threadIdx simt::simt_thread_index()
#define blockIdx simt::simt_block_index()
#define blockDim simt::simt_block_size()
#define gridDim simt::simt_grid_size()
constexpr int warpSize = 32;

#define SIMT_VECTORS(T, name)                               \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };        \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };  \
  static inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTORS(int, int)
SIMT_VECTORS(unsigned, uint)
SIMT_VECTORS(float, float)
#undef SIMT_VECTORS

// -- where threads meet

#define __syncthreads() ((void)simt::simt_barrier(simt::NONE, 0, "__syncthreads", __FILE__, __LINE__))
#define __syncthreads_or(predicate) simt::simt_barrier(simt::OR, !!(predicate), "__syncthreads_or", __FILE__, __LINE__)
#define __syncthreads_and(predicate) simt::simt_barrier(simt::AND, !!(predicate), "__syncthreads_and", __FILE__, __LINE__)
#define __syncthreads_count(predicate) simt::simt_barrier(simt::COUNT, !!(predicate), "__syncthreads_count", __FILE__, __LINE__)
#define __syncwarp(...) simt::SyncWarp{__FILE__, __LINE__}(__VA_ARGS__)
#define __shfl_sync(mask, ...) simt::shuffle(simt::DIRECT, mask, "__shfl_sync", __FILE__, __LINE__, __VA_ARGS__)
#define __shfl_xor_sync(mask, ...) simt::shuffle(simt::XOR, mask, "__shfl_xor_sync", __FILE__, __LINE__, __VA_ARGS__)
#define __shfl_up_sync(mask, ...) simt::shuffle(simt::UP, mask, "__shfl_up_sync", __FILE__, __LINE__, __VA_ARGS__)
#define __shfl_down_sync(mask, ...) simt::shuffle(simt::DOWN, mask, "__shfl_down_sync", __FILE__, __LINE__, __VA_ARGS__)
#define __ballot_sync(mask, predicate) simt::ballot(mask, !!(predicate), "__ballot_sync", __FILE__, __LINE__)
#define __any_sync(mask, predicate) (simt::ballot(mask, !!(predicate), "__any_sync", __FILE__, __LINE__) != 0)
#define __all_sync(mask, predicate) (simt::ballot(mask, !(predicate), "__all_sync", __FILE__, __LINE__) == 0)
#define __nanosleep(nanoseconds) simt::simt_yield("__nanosleep", __FILE__, __LINE__)
#define __trap() simt::simt_fail("__trap", __FILE__, __LINE__)

namespace simt {

struct SyncWarp {
  const char* file;
  int line;
  void operator()(uint32_t mask = 0xffffffffu) const { simt_warp(nullptr, SYNCWARP, mask, "__syncwarp", file, line, nullptr); }
};

enum ShuffleKind { DIRECT, XOR, UP, DOWN };

template <class T>
struct ShuffleArgument {
  T value, result;
  int source;
};

// A lane whose source is no lane of its segment keeps its value; a source outside the mask gives bytes of 0xff, which shows.
template <class T>
T shuffle(ShuffleKind kind, uint32_t mask, const char* what, const char* file, int line, T value, int by, int width = 32) {
  const int lane = int(simt_lane()), start = lane & ~(width - 1), local = lane - start;
  const int to = kind == DIRECT ? by & (width - 1) : kind == XOR ? local ^ by : kind == UP ? local - by : local + by;
  ShuffleArgument<T> argument{value, value, to < 0 || to >= width ? lane : start + to};
  WarpOperation exchange = [](void** all, uint32_t named) {
    for (int l = 0; l < 32; l++) {
      if (!(named >> l & 1)) continue;
      auto* own = static_cast<ShuffleArgument<T>*>(all[l]);
      if (named >> own->source & 1) own->result = static_cast<ShuffleArgument<T>*>(all[own->source])->value;
      else memset(&own->result, 0xff, sizeof(T));
    }
  };
  simt_warp(exchange, SHUFFLE, mask, what, file, line, &argument);
  return argument.result;
}

inline uint32_t ballot(uint32_t mask, bool predicate, const char* what, const char* file, int line) {
  struct Argument {
    bool predicate;
    uint32_t result;
  } argument{predicate, 0};
  WarpOperation vote = [](void** all, uint32_t named) {
    uint32_t result = 0;
    for (int l = 0; l < 32; l++)
      if (named >> l & 1) result |= uint32_t(static_cast<Argument*>(all[l])->predicate) << l;
    for (int l = 0; l < 32; l++)
      if (named >> l & 1) static_cast<Argument*>(all[l])->result = result;
  };
  simt_warp(vote, VOTE, mask, what, file, line, &argument);
  return argument.result;
}

#define SIMT_UNCOUNTED __attribute__((no_sanitize("thread")))

// -- memory that other blocks and ranks see; acquire loads are where a spinning thread lets the others run

template <class T>
SIMT_UNCOUNTED T load_acquire(const T* address, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt_yield("load_acquire", file, line);
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}
template <class T>
SIMT_UNCOUNTED void store_release(T* address, std::common_type_t<T> value) {
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
}
template <class T, class Change>
SIMT_UNCOUNTED T atomic(T* address, Change change) {
  simt_count(ATOMIC);
  T before, after;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  do after = change(before);
  while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
  return before;
}

// Volta's tensor-core step: sums [8] += A B with this lane's fragments, 4 halves each (mma.h). b_row: B by rows, else by columns.
inline void mma_m8n8k4(bool b_row, float* sums, const uint32_t* a, const uint32_t* b, const char* file, int line) {
  simt_mma_m8n8k4(b_row, sums, a, b, file, line);
}

inline float special(float value) {
  simt_count(SPECIAL);
  return value;
}

}  // namespace simt

#define SIMT_ATOMIC(name, expression)                                                                                          \
  template <class T>                                                                                                           \
  T name(T* address, std::common_type_t<T> value) { return simt::atomic(address, [=](T old) { return T(expression); }); }      \
  template <class T>                                                                                                           \
  T name##_system(T* address, std::common_type_t<T> value) { return name(address, value); }
SIMT_ATOMIC(atomicAdd, old + value)
SIMT_ATOMIC(atomicSub, old - value)
SIMT_ATOMIC(atomicMax, old < value ? value : old)
SIMT_ATOMIC(atomicMin, value < old ? value : old)
SIMT_ATOMIC(atomicOr, old | value)
SIMT_ATOMIC(atomicAnd, old & value)
SIMT_ATOMIC(atomicExch, ((void)old, value))
#undef SIMT_ATOMIC
template <class T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return simt::atomic(address, [=](T old) { return old == expected ? value : old; });
}
static inline SIMT_UNCOUNTED void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline SIMT_UNCOUNTED void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline SIMT_UNCOUNTED void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// -- numbers

struct alignas(2) __half {
  uint16_t bits;
};
static inline float __half2float(__half value) { return simt::half_to_float(value.bits); }
static inline __half __float2half_rn(float value) { return {simt::float_to_half(value)}; }
static inline uint32_t __float_as_uint(float value) { return simt::float_to_bits(value); }
static inline int __float_as_int(float value) { return int(simt::float_to_bits(value)); }
static inline float __uint_as_float(uint32_t bits) { return simt::bits_to_float(bits); }
static inline float __int_as_float(int bits) { return simt::bits_to_float(uint32_t(bits)); }
static inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
static inline int __ffs(int bits) { return __builtin_ffs(bits); }
static inline int __clz(int bits) { return bits ? __builtin_clz(uint32_t(bits)) : 32; }
template <class T>
static inline T __ldg(const T* address) { return *address; }
template <class A, class B>
static inline std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B>
static inline std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
#define exp2f(x) simt::special((exp2f)(x))
#define __expf(x) simt::special((expf)(x))
#define expf(x) simt::special((expf)(x))
#define __logf(x) simt::special((logf)(x))
#define logf(x) simt::special((logf)(x))
#define log2f(x) simt::special((log2f)(x))
#define tanhf(x) simt::special((tanhf)(x))
#define rsqrtf(x) simt::special(1.0f / (sqrtf)(x))
#define __fdividef(a, b) simt::special((a) / (b))
