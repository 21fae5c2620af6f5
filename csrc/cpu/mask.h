// A tile of the attention mask as prefill wants it: what each key adds to the score of each lane, [key][lane] in fp32, bool masks as 0
// and -inf. Whatever its dtype and strides; and whether it matters at all, so that a mask that spells "causal" costs no more than causal.
#pragma once
#include "rows.h"
#include "transpose.h"

namespace ha {

inline vf mask_vector(const float* p) { return load(p); }
inline vf mask_vector(const f16* p) { return load(p); }
inline vf mask_vector(const bf16* p) { return load(p); }
inline vf mask_vector(const double* p) {
    vf x;
    for (int i = 0; i < W; ++i) x[i] = (float)p[i];
    return x;
}
inline vf mask_vector(const uint8_t* p) {                                // GCC takes a conversion of byte vectors apart, lane by lane
#if defined(HA_AVX512)
    vi x = (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(HA_AVX2)
    vi x = (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    vi x;
    for (int i = 0; i < W; ++i) x[i] = p[i];
#endif
    return blend(x != 0, (vf){}, splat(NEG_INF));
}
inline float mask_element(float x) { return x; }
inline float mask_element(f16 x) { return to_float(x); }
inline float mask_element(bf16 x) { return to_float(x); }
inline float mask_element(double x) { return (float)x; }
inline float mask_element(uint8_t x) { return x ? 0.0f : NEG_INF; }

// Keys [0, n) from element offset[lane], key_stride apart, into tile[key * ld + lane] for W lanes.
template <class M>
void gather_mask(const M* mask, const int64_t* offset, int64_t key_stride, int64_t n, float* tile, int64_t ld) {
    bool same = true;
    for (int i = 1; i < W; ++i) same &= offset[i] == offset[0];
    int64_t j = 0;
    if (same) {
        for (; j < n; ++j) store(tile + j * ld, splat(mask_element(mask[offset[0] + j * key_stride])));
    } else if (key_stride == 1) {
        for (; j + W <= n; j += W) {
            vf x[W];
            for (int i = 0; i < W; ++i) x[i] = mask_vector(mask + offset[i] + j);
            transpose(x);
            for (int i = 0; i < W; ++i) store(tile + (j + i) * ld, x[i]);
        }
    }
    for (; j < n; ++j)
        for (int i = 0; i < W; ++i) tile[j * ld + i] = mask_element(mask[offset[i] + j * key_stride]);
}

enum class MaskEffect { none, some, hides_all };

// Keys [key, key + n) for `vectors` * W lanes, whose mask rows begin at element offset[lane], into tile[j * vectors * W + lane].
inline MaskEffect load_mask(const HaAttention& a, const int64_t* offset, int64_t key, int64_t n, int vectors, float* tile) {
    int64_t stride = a.mask_stride[3], skip = key * stride, ld = vectors * W;
    for (int v = 0; v < vectors; ++v) {
        const int64_t* lane = offset + v * W;
        float* to = tile + v * W;
        switch (a.mask_dtype) {
            case HA_BOOL: gather_mask(static_cast<const uint8_t*>(a.mask) + skip, lane, stride, n, to, ld); break;
            case HA_F32: gather_mask(static_cast<const float*>(a.mask) + skip, lane, stride, n, to, ld); break;
            case HA_F16: gather_mask(static_cast<const f16*>(a.mask) + skip, lane, stride, n, to, ld); break;
            case HA_BF16: gather_mask(static_cast<const bf16*>(a.mask) + skip, lane, stride, n, to, ld); break;
            case HA_F64: gather_mask(static_cast<const double*>(a.mask) + skip, lane, stride, n, to, ld); break;
        }
    }
    vi nonzero = {}, shows = {};
    for (int64_t i = 0; i < n * ld; i += W) {
        vf x = load(tile + i);
        nonzero |= x != 0.0f;
        shows |= x != NEG_INF;
    }
    return !any(nonzero) ? MaskEffect::none : any(shows) ? MaskEffect::some : MaskEffect::hides_all;
}

}  // namespace ha
