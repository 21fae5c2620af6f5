// IEEE half precision on the CPU: conversions that round to nearest even, as the device's do.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__) && !defined(SIMT_SOFTWARE_HALF)
#include <immintrin.h>
#endif

namespace simt {

inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline float half_to_float(uint16_t half) {
#if defined(__F16C__) && !defined(SIMT_SOFTWARE_HALF)
  return _cvtsh_ss(half);
#else
  const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  const float moved = bits_to_float(magnitude << 13) * bits_to_float(0x77800000);            // * 2^112 moves the exponent's bias
  return bits_to_float(sign | float_to_bits(moved));
#endif
}

inline uint16_t float_to_half(float value) {
#if defined(__F16C__) && !defined(SIMT_SOFTWARE_HALF)
  return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);                 // rounds to 65536 or more
  if (magnitude < 0x38800000) {                                                // subnormal: the addition rounds at 2^-24
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return uint16_t(sign | (float_to_bits(shifted) - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return uint16_t(sign | (rounded - 0x38000000) >> 13);
#endif
}

}  // namespace simt
