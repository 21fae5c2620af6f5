// What the codecs need of a vector beside arithmetic: magnitudes compared as bits (so that NaN and Inf come out on top), lanes to bytes and
// back, and products that stay products.
#pragma once
#include <cstdint>
#include <cstring>

#include "vec.h"

namespace ha {

// x, rounded: no later sum may swallow the multiplication that made it (the compiler is told -ffp-contract=fast).
template <class F>
inline F apart(F x) {
#if defined(__x86_64__)
    asm("" : "+x"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#else
    volatile F kept = x;
    return kept;
#endif
    return x;
}

inline int32_t magnitude_bits(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits & 0x7fffffff;
}

inline vi max_bits(vi a, vi b) {
#if defined(HA_AVX512)
    return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(HA_AVX2)
    return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    return a > b ? a : b;
#endif
}

inline int32_t widest(vi x) {                                            // the largest lane
    int32_t lanes[W];
    std::memcpy(lanes, &x, sizeof x);
    for (int step = W / 2; step; step /= 2)
        for (int lane = 0; lane < step; ++lane) lanes[lane] = lanes[lane] > lanes[lane + step] ? lanes[lane] : lanes[lane + step];
    return lanes[0];
}

inline vf clamp(vf x, float low, float high) {
    x = max(x, splat(low));
    return x < high ? x : splat(high);
}

// The nearest integer, halves to even, in the low bits of each lane (two's complement; |x| < 2^22). The high bits are not the sign's.
inline vi rounded_bits(vf x) { return bits_of(x + 0x1.8p23f); }

inline vf to_floats(vi x) { return __builtin_convertvector(x, vf); }

inline void narrow(vi x, uint8_t* out) {                                 // the low byte of each lane
#if defined(HA_AVX512)
    _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8((__m512i)x));
#elif defined(HA_AVX2)
    const __m256i low = _mm256_shuffle_epi8((__m256i)x, _mm256_set1_epi32(0x0c080400));      // 4 bytes in each half, four times
    const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storel_epi64((__m128i*)out, both);
#else
    for (int lane = 0; lane < W; ++lane) out[lane] = (uint8_t)x[lane];
#endif
}

inline vi widen(const uint8_t* p) {                                      // W bytes, zeros above them
#if defined(HA_AVX512)
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(HA_AVX2)
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    vi x;
    for (int lane = 0; lane < W; ++lane) x[lane] = p[lane];
    return x;
#endif
}

typedef uint8_t v16 __attribute__((vector_size(16)));
typedef int8_t v16s __attribute__((vector_size(16)));

inline void pack_bytes(const int8_t* q, uint8_t* out) {                  // a group's 32 q -> 16 bytes
    v16 low, high;
    std::memcpy(&low, q, 16);
    std::memcpy(&high, q + 16, 16);
    const v16 both = (low & 15) | (high << 4);
    std::memcpy(out, &both, 16);
}

inline void unpack_bytes(const uint8_t* in, int8_t* q) {                 // 16 bytes -> a group's 32 q
    v16 both;
    std::memcpy(&both, in, 16);
    const v16s low = (v16s)(((both & 15) ^ 8) - 8), high = (v16s)(((both >> 4) ^ 8) - 8);
    std::memcpy(q, &low, 16);
    std::memcpy(q + 16, &high, 16);
}

}  // namespace ha
