// The C ABI between backends/hetero_attn_cpu (ctypes) and the kernels: plain structs of fixed-width fields, no framework types.
// backends/hetero_attn_cpu/abi.py is the Python twin; a test compares sizes and offsets, and ABI_VERSION is part of the build's
// digest. Strides are in ELEMENTS of the tensor they belong to and may be 0 (broadcast) or negative. Nothing here owns memory.
#pragma once
#include <cstdint>

#define HETERO_ATTN_CPU_ABI_VERSION 2

extern "C" {

enum HaDtype : int32_t { HA_NONE = 0, HA_F32 = 1, HA_F16 = 2, HA_BF16 = 3, HA_BOOL = 4, HA_F64 = 5 };

// How loops are run in parallel: the caller's OpenMP runtime (GOMP_parallel of the libgomp that torch loaded), so that no second
// runtime or thread pool exists. Runs fn(data) on up to `threads` threads and returns when all are done. Null: the calling thread alone.
typedef void (*HaParallel)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);

// One attention call (hetero_attn/reference.py is its meaning). Dense: q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv].
// Varlen (cu_q not null): q [Tq, Hq, D]; k, v [Tk, Hkv, D] with cu_k, or pages [num_blocks, page_size, Hkv, D] with block_table and seqused_k.
struct HaAttention {
    int32_t abi_version, dtype;              // dtype of q, k, v and out
    int32_t batch, q_heads, kv_heads, head_dim, v_head_dim, threads;
    int64_t q_len, kv_len;                   // dense lengths; ignored for varlen
    const void *q, *k, *v;
    void* out;
    float* lse;                              // null: not wanted
    int64_t q_stride[4], out_stride[4];      // batch, head, token, element (varlen: batch stride unused)
    int64_t k_stride[4], v_stride[4];        // the same; paged: [0] is the page's stride
    int64_t lse_stride[3];                   // batch, head, token

    const void* mask;                        // [B, Hq, Sq, Skv] by strides
    int32_t mask_dtype;                      // HA_NONE, HA_BOOL (true = attend) or a float added to the scores
    int32_t alibi;                           // 1 when slopes are given
    int64_t mask_stride[4];
    const float* slopes;                     // [B, Hq] by strides
    int64_t slopes_stride[2];
    const float* sinks;                      // [Hq], contiguous; null: none

    float scale, softcap;                    // softcap 0: off
    int64_t left, right;                     // visible: -left <= j - (i + kv_len - q_len) <= right; -1: unlimited. Causal is right = 0

    const int32_t *cu_q, *cu_k;              // [B + 1]
    const int32_t *block_table, *seqused_k;  // [B, max_blocks] with row stride table_stride, [B]
    int64_t table_stride, page_size;
    HaParallel parallel;
};

// y [M, N] = x [M, K] · weightᵀ [N, K] (+ bias [N]); one dtype for all four, sums in fp32. Element strides of rows; columns are contiguous.
struct HaLinear {
    int32_t abi_version, dtype, threads, reserved;
    int64_t m, n, k;
    const void *x, *weight, *bias;           // bias null: none
    void* y;
    int64_t x_stride, weight_stride, y_stride;
    HaParallel parallel;
};

// y [rows, channels] = rms_norm(x [rows, channels], weight [channels]), one dtype for the three; x_stride between rows, y is contiguous.
struct HaNorm {
    int32_t abi_version, dtype, threads, reserved;
    int64_t rows, channels, x_stride;
    const void *x, *weight;
    void* y;
    float eps, offset;                       // offset 0: Llama's order of rounding, else Gemma's (weight + offset)
    HaParallel parallel;
};

// All return 0, or a nonzero code: 1 wrong ABI version, 2 out of memory, 3 unknown dtype.
__attribute__((visibility("default"))) int hetero_attn_cpu_attention(const HaAttention* call);
__attribute__((visibility("default"))) int hetero_attn_cpu_linear(const HaLinear* call);
__attribute__((visibility("default"))) int hetero_attn_cpu_rms_norm(const HaNorm* call);

// 1: from now on every thread of a loop offers the processor after each item, for other threads of the process wait for messages; 0: no more.
__attribute__((visibility("default"))) void hetero_attn_cpu_share_processor(int32_t share);

// What this object was built for, e.g. "avx512bf16"; and its layout: which = 0 ABI version, 1 sizeof(HaAttention), 2 sizeof(HaLinear), 3 sizeof(HaNorm).
__attribute__((visibility("default"))) const char* hetero_attn_cpu_instruction_set(void);
__attribute__((visibility("default"))) int64_t hetero_attn_cpu_layout(int32_t which);
}
