// One vector type per instruction set, so that every kernel is written once: GCC/Clang vector extensions for arithmetic (a * b + c
// contracts to FMA), intrinsics only where the language has no word for the instruction (max with x86's NaN rule, half conversions).
// The instruction set is the compiler's flags: this file asks what it was given and never dispatches at run time.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"                   // GCC's own AVX-512 headers: _mm512_undefined_ps() and the like
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace ha {

#if defined(HETERO_ATTN_PORTABLE)                                        // the object that others are checked against, on ARM too
constexpr int W = 4;                         // SSE2's width on x86-64
constexpr int VECTOR_REGISTERS = 16;
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define HA_AVX512 1
constexpr int W = 16;                        // floats in a vector
constexpr int VECTOR_REGISTERS = 32;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define HA_AVX2 1
constexpr int W = 8;
constexpr int VECTOR_REGISTERS = 16;
#elif defined(__aarch64__)
#define HA_NEON 1
constexpr int W = 4;
constexpr int VECTOR_REGISTERS = 32;
#else
constexpr int W = 4;                         // portable: SSE2's width on x86-64, plain code elsewhere
constexpr int VECTOR_REGISTERS = 16;
#endif

#if defined(HA_AVX512) && defined(__AVX512BF16__)
#define HA_BF16_DOT 1                        // native dot products of bf16 pairs into fp32
inline const char* instruction_set() { return "avx512bf16"; }
#elif defined(HA_AVX512)
inline const char* instruction_set() { return "avx512"; }
#elif defined(HA_AVX2)
inline const char* instruction_set() { return "avx2"; }
#elif defined(HA_NEON)
inline const char* instruction_set() { return "neon"; }
#else
inline const char* instruction_set() { return "portable"; }
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));                 // halves as bits
typedef float vf_unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(W * 2), aligned(2), may_alias));

struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };

inline vf splat(float x) { return x - (vf){}; }                          // x - 0 keeps -0 and NaN
inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<vf_unaligned*>(p) = x; }
inline vi bits_of(vf x) { return (vi)x; }
inline vf float_of(vi x) { return (vf)x; }
inline vf blend(vi mask, vf yes, vf no) { return mask ? yes : no; }      // mask lanes are 0 or -1
inline vi lane_index() {
    vi x;
    for (int i = 0; i < W; ++i) x[i] = i;
    return x;
}

// a > b ? a : b: where either is NaN the result is b. Running maxima pass the new value as `a`, so a NaN score is skipped here
// and comes back through exp.
inline vf max(vf a, vf b) {
#if defined(HA_AVX512)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(HA_AVX2)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
    return a > b ? a : b;
#endif
}

inline float sum(vf x) {                                                 // a fixed tree: the same bits everywhere of one width
    float lanes[W];
    store(lanes, x);
    for (int step = W / 2; step; step /= 2)
        for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
    return lanes[0];
}

// ---- half types: scalar, then W at a time ----
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    uint32_t u = (uint32_t)x.bits << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline float to_float(f16 x) {                                           // exact, subnormals and infinities included
    uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, body = x.bits & 0x7fff, u;
    if (body >= 0x7c00) u = sign | 0x7f800000 | ((body & 0x3ff) << 13);
    else if (body >= 0x400) u = sign | ((body + 0x1c000) << 13);
    else {
        float small = (float)body * 0x1p-24f;
        std::memcpy(&u, &small, 4);
        u |= sign;
    }
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline void from_float(float x, float* p) { *p = x; }
inline void from_float(float x, bf16* p) {                               // nearest even; NaN stays NaN
    uint32_t u;
    std::memcpy(&u, &x, 4);
    p->bits = (u & 0x7fffffff) > 0x7f800000 ? (uint16_t)(u >> 16 | 0x40) : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline void from_float(float x, f16* p) {                                // nearest even, overflow to infinity
    uint32_t u;
    std::memcpy(&u, &x, 4);
    uint32_t sign = u >> 16 & 0x8000, body = u & 0x7fffffff;
    if (body > 0x7f800000) p->bits = sign | 0x7e00;
    else if (body >= 0x477ff000) p->bits = sign | 0x7c00;                // 65520 and beyond
    else if (body >= 0x38800000) p->bits = sign | ((body - 0x38000000 + 0xfff + (body >> 13 & 1)) >> 13);
    else {                                                               // subnormal: the adder rounds for us
        float magnitude, shifted;
        std::memcpy(&magnitude, &body, 4);
        shifted = magnitude + 0.5f;                                      // ulp of 0.5 is 2^-24, fp16's smallest step
        std::memcpy(&u, &shifted, 4);
        p->bits = sign | (u - 0x3f000000);
    }
}

inline vf load(const bf16* p) {
#if defined(HA_AVX512)                                                    // GCC 12 widens by four shuffles where one instruction does
    return (vf)((vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)) << 16);
#elif defined(HA_AVX2)
    return (vf)((vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#else
    vh h = *reinterpret_cast<const vh_unaligned*>(p);
    return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}
inline vf load(const f16* p) {
#if defined(HA_AVX512)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(HA_AVX2)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(HA_NEON)
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p)));
#else
    vf x;
    for (int i = 0; i < W; ++i) x[i] = to_float(p[i]);
    return x;
#endif
}
inline void store(bf16* p, vf x) {
    vu u = (vu)x;
    vu rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    vu quiet = u >> 16 | 0x40;
    vu h = (vu)((u & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
    *reinterpret_cast<vh_unaligned*>(p) = __builtin_convertvector(h, vh);
}
inline void store(f16* p, vf x) {
#if defined(HA_AVX512)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(HA_AVX2)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(HA_NEON)
    vst1_u16((uint16_t*)p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
#else
    for (int i = 0; i < W; ++i) from_float(x[i], p + i);
#endif
}

// ---- elementary functions ----
// exp(x) for x <= 88: 2^n · e^r by a degree-6 polynomial in r, |r| <= ln2 / 2; under 2 ulp, 0 below -87.7, NaN stays NaN. Natural
// logarithms throughout, never base 2: a float mask may hold finfo.min, which log2(e) would push to -inf.
inline vf exp(vf x) {
    x = x < -88.0f ? splat(-88.0f) : x;
    constexpr float MAGIC = 0x1.8p23f + 127.0f;                          // adding it leaves round(x) + 127 in the low bits
    vf t = x * 1.44269504088896341f + MAGIC;
    vf n = t - MAGIC;
    vf r = x - n * 0.693145751953125f;                                   // ln2 in two parts; the first is exact times n
    r = r - n * 1.42860682030941723212e-6f;
    vf p = r * 1.3888889e-3f + 8.3333333e-3f;                            // Taylor coefficients 1/6! .. 1/0!
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * float_of(bits_of(t) << 23);                               // n = -127 makes a scale of 0
}

inline vf tanh(vf x) {                                                   // absolute error 1e-7, relative 1e-6 near 0
    vf y = (vf)((vi)x & 0x7fffffff);
    vf e = exp(y * -2.0f);
    vf large = (1.0f - e) / (1.0f + e);
    large = (vf)((vi)large | ((vi)x & (int32_t)0x80000000));
    vf s = x * x;
    vf series = x + x * s * (-0.33333333f + s * (0.13333333f + s * (-0.053968254f + s * 0.021869488f)));
    return y < 0.25f ? series : large;
}

}  // namespace ha
