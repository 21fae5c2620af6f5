// Halves as bits, exponentials, and the tensor-core step: everything that is PTX on the device and a function of csrc/simt on the CPU.
// No CUDA header is included, so that NVRTC alone compiles the kernels.
#pragma once

#define INFINITY_F __int_as_float(0x7f800000)
constexpr float LOG2_E = 1.4426950408889634f;

#if defined(SIMT)
#define MMA(b_row, sums, a, b) simt::mma_m8n8k4(b_row, sums, a, b, __FILE__, __LINE__)
static __device__ __forceinline__ unsigned pack_halves(float low, float high) {
  simt::simt_count(simt::SPECIAL);                     // Volta converts where it takes exponentials, each half by itself
  simt::simt_count(simt::SPECIAL);
  return simt::float_to_half(low) | unsigned(simt::float_to_half(high)) << 16;
}
static __device__ __forceinline__ float half_to_float(unsigned short bits) { return simt::half_to_float(bits); }
static __device__ __forceinline__ float power_of_2(float x) { return exp2f(x); }
#else
#define MMA_PTX(layout, sums, a, b)                                                                                               \
  asm volatile("mma.sync.aligned.m8n8k4." layout ".f32.f16.f16.f32 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9}, {%10,%11}, "              \
               "{%0,%1,%2,%3,%4,%5,%6,%7};"                                                                                       \
               : "+f"((sums)[0]), "+f"((sums)[1]), "+f"((sums)[2]), "+f"((sums)[3]), "+f"((sums)[4]), "+f"((sums)[5]),            \
                 "+f"((sums)[6]), "+f"((sums)[7])                                                                                 \
               : "r"((a)[0]), "r"((a)[1]), "r"((b)[0]), "r"((b)[1]))
#define MMA(b_row, sums, a, b)                          \
  do {                                                  \
    if (b_row) MMA_PTX("row.row", sums, a, b);          \
    else MMA_PTX("row.col", sums, a, b);                \
  } while (0)
static __device__ __forceinline__ unsigned pack_halves(float low, float high) {
  unsigned packed;
  asm("{ .reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h}; }" : "=r"(packed) : "f"(low), "f"(high));
  return packed;
}
static __device__ __forceinline__ float half_to_float(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
static __device__ __forceinline__ float power_of_2(float x) {
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}
#endif

// Whether any of the two halves is Inf or NaN: an exponent of all ones.
static __device__ __forceinline__ bool any_not_finite(unsigned halves) {
  return (halves & 0x7c00u) == 0x7c00u || (halves & 0x7c000000u) == 0x7c000000u;
}
