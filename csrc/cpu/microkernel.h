// The register-blocked product that prefill and linear share. Lanes are ROWS (queries, tokens): the B operand is a panel of NV vectors
// of rows for each k, the A operand is broadcast element by element from memory that needs no packing (keys, values, weights as they lie).
//   C[m][0 .. NV*W) (+)= sum over k of A[m * a_m + k * a_k] * B[k * b_k + 0 .. NV*W)
// Scores: A = keys (a_m = row, a_k = 1), B = queries transposed. Output: A = values (a_m = 1, a_k = row), B = probabilities. Both
// results come out transposed, so the softmax over keys is vertical: no horizontal sums anywhere.
#pragma once
#include "vec.h"

namespace ha {

// Vectors in a panel, and rows of A per block. 32 registers hold 8 x 3 accumulators + 3 of B + a broadcast; 16 hold 4 x 3 + 3 + 1, which
// loads less per multiply-add than 6 x 2. Without FMA the product needs a register of its own, hence 6 x 2.
#if defined(HA_AVX512) || defined(HA_AVX2) || defined(HA_NEON)
constexpr int MAX_NV = 3;
#else
constexpr int MAX_NV = 2;
#endif
constexpr int BLOCK_M = VECTOR_REGISTERS == 32 ? 8 : MAX_NV == 3 ? 4 : 6;

// Rows of A per block beside a panel of nv vectors: one vector alone needs eight sums in flight to hide an FMA's latency.
constexpr int block_rows(int nv) { return nv == 1 ? 8 : BLOCK_M; }

template <int M, int NV>
inline __attribute__((always_inline)) void product_block(int64_t K, const float* A, int64_t a_m, int64_t a_k, const float* B, int64_t b_k,
                                                         float* C, int64_t c_m, bool accumulate) {
    vf acc[M][NV];
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < NV; ++n) acc[m][n] = accumulate ? load(C + m * c_m + n * W) : (vf){};
    for (int64_t k = 0; k < K; ++k) {
        vf b[NV];
        for (int n = 0; n < NV; ++n) b[n] = load(B + k * b_k + n * W);
        for (int m = 0; m < M; ++m) {
            vf a = splat(A[m * a_m + k * a_k]);
            for (int n = 0; n < NV; ++n) acc[m][n] = a * b[n] + acc[m][n];
        }
    }
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < NV; ++n) store(C + m * c_m + n * W, acc[m][n]);
}

// Any number of rows M of A in blocks of block_rows(NV), then 4, 2, 1. `between` is called before each block.
template <int NV, class Between>
inline __attribute__((always_inline)) void product_rows(int64_t M, int64_t K, const float* A, int64_t a_m, int64_t a_k, const float* B,
                                                        int64_t b_k, float* C, int64_t c_m, bool accumulate, const Between& between) {
    constexpr int BLOCK = block_rows(NV);
    int64_t m = 0;
    for (; m + BLOCK <= M; m += BLOCK) {
        between();
        product_block<BLOCK, NV>(K, A + m * a_m, a_m, a_k, B, b_k, C + m * c_m, c_m, accumulate);
    }
    if constexpr (BLOCK > 4)
        if (m + 4 <= M) {
            product_block<4, NV>(K, A + m * a_m, a_m, a_k, B, b_k, C + m * c_m, c_m, accumulate);
            m += 4;
        }
    if constexpr (BLOCK > 2)
        if (m + 2 <= M) {
            product_block<2, NV>(K, A + m * a_m, a_m, a_k, B, b_k, C + m * c_m, c_m, accumulate);
            m += 2;
        }
    if (m < M) product_block<1, NV>(K, A + m * a_m, a_m, a_k, B, b_k, C + m * c_m, c_m, accumulate);
}

}  // namespace ha
