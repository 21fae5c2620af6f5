// The products of prefill by AVX512_BF16's dot of bf16 pairs into fp32 lanes: twice the multiply-adds of an fp32 instruction, and tiles of
// half the size. Queries and keys are taken as they are, in pairs along the head's dimension, and the fp32 score is scaled; weights are
// rounded to bf16 (as every device with matrix units does; their sum l is not) and lie, as the values do, in pairs along the keys.
#pragma once
#include "prefill_products.h"

namespace ha {
#if defined(HA_BF16_DOT)

typedef int32_t bf16_pair __attribute__((may_alias, aligned(4)));        // the first in the low half

inline int32_t pair_of(bf16 low, bf16 high) { return (int32_t)((uint32_t)high.bits << 16 | low.bits); }
inline vf pair_of(vf low, vf high) {                                     // both exactly bf16
    return (vf)((vu)low >> 16 | (vu)high);
}

inline vf weight_pair(vf low, vf high) {                                 // rounded to nearest even
    typedef uint16_t vpair __attribute__((vector_size(W * 4)));
    vi order;
    for (int i = 0; i < W; ++i) order[i] = i | (i + W) << 16;            // lane i: halves i and i + W of the conversion below
    return (vf)(vpair)_mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

struct Bf16Products {
    static constexpr int PAIR = 2;

    static void pack_queries(const bf16* const (&rows)[W], int64_t D, int64_t element_stride, float, float* to, int64_t ld) {
        int64_t pair = 0;
        if (element_stride == 1)
            for (; 2 * (pair + W) <= D; pair += W) {
                vf x[W];
                for (int i = 0; i < W; ++i) {
                    x[i] = (vf){};
                    if (rows[i]) std::memcpy(&x[i], rows[i] + 2 * pair, sizeof(vf));
                }
                transpose(x);
                for (int i = 0; i < W; ++i) store(to + (pair + i) * ld, x[i]);
            }
        for (; 2 * pair < D; ++pair)
            for (int i = 0; i < W; ++i)
                reinterpret_cast<bf16_pair*>(to)[pair * ld + i] = rows[i] ? row_pair(rows[i], 2 * pair, D, element_stride) : 0;
    }
    static void load_keys(const Rows<bf16>& keys, int64_t j, int64_t n, int64_t D, float* tile, int64_t ld) {
        for (int64_t i = 0; i < n; ++i) {
            const bf16* row = keys.row(j + i);
            bf16_pair* to = reinterpret_cast<bf16_pair*>(tile + i * ld);
            int64_t d = 0;
            if (keys.element_stride == 1) {
                d = D / 2 * 2;
                std::memcpy(to, row, d * sizeof(bf16));
            }
            for (; d < D; d += 2) to[d / 2] = row_pair(row, d, D, keys.element_stride);
        }
    }
    static void load_values(const Rows<bf16>& values, int64_t j, int64_t n, int64_t Dv, float* tile, int64_t ld) {
        for (int64_t i = 0; i < n; i += 2) {
            const bf16 *low = values.row(j + i), *high = i + 1 < n ? values.row(j + i + 1) : nullptr;
            float* to = tile + i / 2 * ld;
            int64_t d = 0, stride = values.element_stride;
            if (stride == 1)
                for (; d + W <= Dv; d += W) store(to + d, pair_of(load(low + d), high ? load(high + d) : (vf){}));
            for (; d < Dv; ++d) reinterpret_cast<bf16_pair*>(to)[d] = pair_of(low[d * stride], high ? high[d * stride] : bf16{0});
        }
    }
    static bool finite_values(const float* tile, int64_t n, int64_t Dv, int64_t ld) {
        vi poison = {};                                                  // an exponent of ones in either half
        int32_t tail = 0;
        for (int64_t i = 0; 2 * i < n; ++i) {
            int64_t d = 0;
            for (; d + W <= Dv; d += W) {
                vi x = bits_of(load(tile + i * ld + d));
                poison |= ((x & 0x7f80) == 0x7f80) | ((x & 0x7f800000) == 0x7f800000);
            }
            for (; d < Dv; ++d) {
                int32_t x = reinterpret_cast<const bf16_pair*>(tile)[i * ld + d];
                tail |= (x & 0x7f80) == 0x7f80 || (x & 0x7f800000) == 0x7f800000;
            }
        }
        return !any(poison) && !tail;
    }
    template <int NV>
    static __attribute__((noinline)) void scores(int64_t n, int64_t D, const float* k, int64_t ld, const float* q, float scale,
                                                 float* scores, int64_t lanes, Ahead<bf16>& ahead) {
        dot_rows<NV, false>(n, (D + 1) / 2, k, ld, 1, q, lanes, scores, scale, ahead);
    }
    template <int NV>
    static __attribute__((noinline)) void outputs(int64_t Dv, int64_t n, const float* v, int64_t ld, const float* weights, float* o,
                                                  int64_t lanes, Ahead<bf16>& ahead) {
        dot_rows<NV, true>(Dv, (n + 1) / 2, v, 1, ld, weights, lanes, o, 1.0f, ahead);
    }

private:
    static int32_t row_pair(const bf16* row, int64_t d, int64_t D, int64_t stride) {
        return pair_of(row[d * stride], d + 1 < D ? row[(d + 1) * stride] : bf16{0});
    }
    // As product_block of microkernel.h, k counting pairs; added to C, or scaled and stored.
    template <int M, int NV, bool accumulate>
    static inline __attribute__((always_inline)) void dot_block(int64_t K, const float* A, int64_t a_m, int64_t a_k, const float* B,
                                                                int64_t lanes, float* C, float scale) {
        const bf16_pair* a = reinterpret_cast<const bf16_pair*>(A);
        vf acc[M][NV];
        for (int m = 0; m < M; ++m)
            for (int n = 0; n < NV; ++n) acc[m][n] = accumulate ? load(C + m * lanes + n * W) : (vf){};
        for (int64_t k = 0; k < K; ++k) {
            vf b[NV];
            for (int n = 0; n < NV; ++n) b[n] = load(B + k * lanes + n * W);
            for (int m = 0; m < M; ++m) {
                __m512bh pair = (__m512bh)_mm512_set1_epi32(a[m * a_m + k * a_k]);
                for (int n = 0; n < NV; ++n) acc[m][n] = (vf)_mm512_dpbf16_ps((__m512)acc[m][n], pair, (__m512bh)b[n]);
            }
        }
        for (int m = 0; m < M; ++m)
            for (int n = 0; n < NV; ++n) store(C + m * lanes + n * W, accumulate ? acc[m][n] : acc[m][n] * scale);
    }
    template <int NV, bool accumulate>
    static inline __attribute__((always_inline)) void dot_rows(int64_t M, int64_t K, const float* A, int64_t a_m, int64_t a_k,
                                                               const float* B, int64_t lanes, float* C, float scale, Ahead<bf16>& ahead) {
        int64_t m = 0;
        for (; m + BLOCK_M <= M; m += BLOCK_M) {
            ahead();
            dot_block<BLOCK_M, NV, accumulate>(K, A + m * a_m, a_m, a_k, B, lanes, C + m * lanes, scale);
        }
        if (m + 4 <= M) {
            dot_block<4, NV, accumulate>(K, A + m * a_m, a_m, a_k, B, lanes, C + m * lanes, scale);
            m += 4;
        }
        for (; m < M; ++m) dot_block<1, NV, accumulate>(K, A + m * a_m, a_m, a_k, B, lanes, C + m * lanes, scale);
    }
};

template <>
struct ProductsOf<bf16> {
    typedef Bf16Products type;
};

#else
inline vf weight_pair(vf low, vf) { return low; }                        // no pairs without the instruction
#endif
}  // namespace ha
