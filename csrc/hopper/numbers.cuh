// Eight numbers at a time, whatever their format: fp32 in registers, 16 bytes of halves or 32 of fp32 in memory. No CUDA header is
// included, so that NVRTC alone compiles the kernels; bf16 is converted by integer arithmetic, which every architecture has.
#pragma once

enum Kind : int { F32 = 0, BF16 = 1, F16 = 2 };

#if !defined(X_KIND)
#define X_KIND 1
#endif
constexpr int X_BYTES = X_KIND == F32 ? 4 : 2;

struct Vector {                            // 16 bytes as they lie
  unsigned word[4];
};
struct Eight {
  float at[UNIT];
};

#if defined(SIMT)
static __device__ __forceinline__ float half_to_float(unsigned bits) { return simt::half_to_float((unsigned short)bits); }
static __device__ __forceinline__ unsigned float_to_half(float value) { return simt::float_to_half(value); }
#else
static __device__ __forceinline__ float half_to_float(unsigned bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((unsigned short)bits));
  return value;
}
static __device__ __forceinline__ unsigned float_to_half(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#endif

static __device__ __forceinline__ float bf16_to_float(unsigned bits) { return __uint_as_float(bits << 16); }
static __device__ __forceinline__ unsigned float_to_bf16(float value) {                    // to nearest, ties to even
  const unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40;                      // NaN stays NaN
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// As the format holds it.
static __device__ __forceinline__ float rounded(float value, int kind) {
  if (kind == BF16) return bf16_to_float(float_to_bf16(value));
  if (kind == F16) return half_to_float(float_to_half(value));
  return value;
}

// Half of eight fp32, or eight halves: the numbers of one vector, from its place among the eight on.
static __device__ __forceinline__ void unpack(const Vector& from, int kind, int place, Eight& to) {
  if (kind == F32) {
    for (int i = 0; i < 4; i++) to.at[place + i] = __uint_as_float(from.word[i]);
    return;
  }
  for (int i = 0; i < 4; i++) {
    const unsigned low = from.word[i] & 0xffff, high = from.word[i] >> 16;
    to.at[2 * i] = kind == BF16 ? bf16_to_float(low) : half_to_float(low);
    to.at[2 * i + 1] = kind == BF16 ? bf16_to_float(high) : half_to_float(high);
  }
}
static __device__ __forceinline__ Vector pack(const Eight& from, int kind, int place) {
  Vector to;
  for (int i = 0; i < 4; i++) {
    if (kind == F32) to.word[i] = __float_as_uint(from.at[place + i]);
    else if (kind == BF16) to.word[i] = float_to_bf16(from.at[2 * i]) | float_to_bf16(from.at[2 * i + 1]) << 16;
    else to.word[i] = float_to_half(from.at[2 * i]) | float_to_half(from.at[2 * i + 1]) << 16;
  }
  return to;
}

static __device__ __forceinline__ Vector load_vector(const uint4* from) {
  const uint4 read = *from;
  return {{read.x, read.y, read.z, read.w}};
}
static __device__ __forceinline__ void store_vector(uint4* to, const Vector& vector) {
  *to = make_uint4(vector.word[0], vector.word[1], vector.word[2], vector.word[3]);
}

// Unit `unit` of an array that only this rank touches.
static __device__ __forceinline__ Eight load_own(unsigned long long array, int kind, long long unit) {
  Eight eight;
  const uint4* from = reinterpret_cast<const uint4*>(array);
  if (kind == F32) {                       // (two branches and no loop: an index that is not constant would put the eight into local memory)
    unpack(load_vector(from + 2 * unit), F32, 0, eight);
    unpack(load_vector(from + 2 * unit + 1), F32, 4, eight);
  } else {
    unpack(load_vector(from + unit), kind, 0, eight);
  }
  return eight;
}
static __device__ __forceinline__ void store_own(unsigned long long array, int kind, long long unit, const Eight& eight) {
  uint4* to = reinterpret_cast<uint4*>(array);
  if (kind == F32) {
    store_vector(to + 2 * unit, pack(eight, F32, 0));
    store_vector(to + 2 * unit + 1, pack(eight, F32, 4));
  } else {
    store_vector(to + unit, pack(eight, kind, 0));
  }
}

// The same where the array may end within the unit: `left` of its numbers are there, what is beyond reads as 0 and is not written.
static __device__ __forceinline__ Eight load_part(unsigned long long array, int kind, long long unit, long long left) {
  if (left >= UNIT) return load_own(array, kind, unit);
  Eight eight;
#pragma unroll
  for (int i = 0; i < UNIT; i++) {
    const long long at = unit * UNIT + i;
    eight.at[i] = 0.0f;
    if (i < left) {
      if (kind == F32) eight.at[i] = reinterpret_cast<const float*>(array)[at];
      else if (kind == BF16) eight.at[i] = bf16_to_float(reinterpret_cast<const unsigned short*>(array)[at]);
      else eight.at[i] = half_to_float(reinterpret_cast<const unsigned short*>(array)[at]);
    }
  }
  return eight;
}
static __device__ __forceinline__ void store_part(unsigned long long array, int kind, long long unit, long long left, const Eight& eight) {
  if (left >= UNIT) return store_own(array, kind, unit, eight);
#pragma unroll
  for (int i = 0; i < UNIT; i++) {
    const long long at = unit * UNIT + i;
    if (i >= left) continue;
    const unsigned bits = kind == BF16 ? float_to_bf16(eight.at[i]) : float_to_half(eight.at[i]);
    if (kind == F32) reinterpret_cast<float*>(array)[at] = eight.at[i];
    else reinterpret_cast<unsigned short*>(array)[at] = (unsigned short)bits;
  }
}
