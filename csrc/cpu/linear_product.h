// What a product of rows multiplies and in what units: vectors lie ALONG K, in x and in the weight alike, so both are read as they are
// stored and any number of rows fits; the W partial sums of an output are folded once per block of K. fp32 and fp16 (and bf16 without
// the instruction) are widened to fp32; with native bf16 dot products a vector holds 2 W bf16 values and nothing is widened.
#pragma once
#include <algorithm>
#include <utility>

#include "abi.h"
#include "vec.h"

namespace ha {

#define HA_INLINE inline __attribute__((always_inline))

// How T is multiplied. Packed: the type of a packed operand; STEP: elements of K in a vector.
template <class T>
struct Product {
    using Packed = float;
    using Vector = vf;
    static constexpr int STEP = W;
    static HA_INLINE Vector widen(const T* p) { return load(p); }
    static HA_INLINE Vector packed(const float* p) { return load(p); }
    static HA_INLINE void pack(float* p, Vector v) { store(p, v); }
    static HA_INLINE vf add(vf sums, Vector a, Vector b) { return a * b + sums; }
};

#if defined(HA_BF16_DOT)
template <>
struct Product<bf16> {
    using Packed = bf16;
    using Vector = __m512i;
    static constexpr int STEP = 2 * W;
    static HA_INLINE Vector widen(const bf16* p) { return _mm512_loadu_si512(p); }
    static HA_INLINE Vector packed(const bf16* p) { return _mm512_loadu_si512(p); }
    static HA_INLINE void pack(bf16* p, Vector v) { _mm512_storeu_si512(p, v); }
    static HA_INLINE vf add(vf sums, Vector a, Vector b) {               // two products a lane; subnormals count as zero
        return (vf)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
    }
};
#endif

// The last `n` < STEP elements of a row, zeros behind them: nothing is read past its end.
template <class T>
HA_INLINE typename Product<T>::Vector widen_tail(const T* p, int64_t n) {
    T tail[Product<T>::STEP] = {};
    for (int64_t i = 0; i < n; ++i) tail[i] = p[i];
    return Product<T>::widen(tail);
}

template <class T>
int64_t steps_of(int64_t k) { return (k + Product<T>::STEP - 1) / Product<T>::STEP; }

// `rows` rows of k elements, interleaved and filled up with zeros: packed [step][rows][STEP].
template <class T>
void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t k, typename Product<T>::Packed* to) {
    using P = Product<T>;
    for (int64_t r = 0; r < rows; ++r) {
        const T* row = from + r * stride;
        auto* at = to + r * P::STEP;
        int64_t i = 0;
        for (; i + P::STEP <= k; i += P::STEP, at += rows * P::STEP) P::pack(at, P::widen(row + i));
        if (i < k) P::pack(at, widen_tail(row + i, k - i));
    }
}

// ---- folding: the sums over the lanes of N vectors, W of them in a vector ----
template <int D, bool HIGH>
constexpr int folded_lane(int i) { return i % (2 * D) < D ? i + (HIGH ? D : 0) : W + i - (HIGH ? 0 : D); }

template <int D, size_t... I>
HA_INLINE vf fold_pair(vf a, vf b, std::index_sequence<I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, folded_lane<D, false>(I)...) + __builtin_shufflevector(a, b, folded_lane<D, true>(I)...);
#else
    return __builtin_shuffle(a, b, vi{folded_lane<D, false>(I)...}) + __builtin_shuffle(a, b, vi{folded_lane<D, true>(I)...});
#endif
}

// Each level halves the number of vectors and the distance of the lanes that are added; the order of additions is that of sum().
template <int N, int D>
HA_INLINE void fold_level(vf* v) {
    constexpr int HALF = (N + 1) / 2;
    for (int i = 0; i < HALF; ++i) v[i] = fold_pair<D>(v[i], v[i + HALF < N ? i + HALF : i], std::make_index_sequence<W>{});
    if constexpr (D > 1) fold_level<HALF, D / 2>(v);
}

template <int N>
constexpr int FOLDED = (N + W - 1) / W;                                  // vectors that hold N folded sums

template <int N>
HA_INLINE void fold(vf* v) { fold_level<N, W / 2>(v); }

// Where fold<N> leaves the sum of vector i: its index among FOLDED<N> * W floats.
constexpr int folded_place(int count, int i) {
    int lane = 0;
    for (int d = W / 2; d; d /= 2) {
        int half = (count + 1) / 2;
        if (i >= half) i -= half, lane += d;
        count = half;
    }
    return i * W + lane;
}

// y [n] = sums [n] + bias [n], rounded once.
template <class T>
void finish_outputs(const float* sums, const T* bias, T* y, int64_t n) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(y + i, bias ? load(sums + i) + load(bias + i) : load(sums + i));
    for (; i < n; ++i) from_float(bias ? sums[i] + to_float(bias[i]) : sums[i], y + i);
}

}  // namespace ha
