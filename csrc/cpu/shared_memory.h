// The C ABI of the shared-memory collectives between backends/hetero_attn_cpu/communicator.py (ctypes) and shared_memory.cpp: plain
// integers and addresses, because a struct filled field by field would cost Python more than a small all-reduce takes.
//
// Every rank maps one segment of each rank. Segment 0 begins with the rank's control lines and its two staging buffers; the rest of it,
// and all of any segment added later, is the rank's heap, whose buffers the others read and write where they lie.
#pragma once
#include <cstdint>

#define HA_API __attribute__((visibility("default")))

extern "C" {

struct HaGroup;

// dtypes beyond HaDtype's that a sum is defined for
enum HaSummable : int32_t { HA_U8 = 8, HA_I8 = 9, HA_I16 = 10, HA_I32 = 11, HA_I64 = 12 };

// Called about ten times a second while a call waits. missing: bit r is set when rank r has not come yet. Nonzero: give up.
typedef int (*HaWaiting)(uint64_t missing);

// stage_bytes: one staging buffer, a multiple of 4096. one_shot_bytes: up to this size an all-reduce is one exchange of everything.
// crowded: 1 when the ranks outnumber their cores. Null when there is no memory.
HA_API HaGroup* hetero_attn_cpu_group_open(int32_t rank, int32_t world_size, int64_t stage_bytes, int64_t one_shot_bytes, int32_t crowded,
                                           HaWaiting waiting);
HA_API void hetero_attn_cpu_group_close(HaGroup* group);

// bases: where each rank's next segment is mapped in this process, page aligned; bytes of each. 0, or 1 when there are too many segments.
HA_API int hetero_attn_cpu_group_add(HaGroup* group, const uint64_t* bases, int64_t bytes);

// Of segment 0: bytes before the heap for this stage_bytes.
HA_API int64_t hetero_attn_cpu_group_reserved(int64_t stage_bytes);

// Collectives. All ranks make the same calls in the same order. They return
//   >= 0  done; the largest `wanted` that any rank passed (bytes of heap it would like to have), the same number on every rank
//   -1    `waiting` said to give up: the group is broken
//   -2    another rank made another call: the group is broken; hetero_attn_cpu_group_odd says which rank
//   -3    unknown dtype, or a row that does not fit a staging buffer: nothing was sent
// Pointers need no alignment beyond their dtype's; x and out may be anywhere, and are not copied when they lie in this rank's heap.

// x [count] becomes the sum over ranks, added in rank order; 16-bit floats in fp32, rounded once.
HA_API int64_t hetero_attn_cpu_all_reduce(HaGroup* group, void* x, int64_t count, int32_t dtype, int64_t wanted);

// out [own rows, width] = this rank's rows of the sum of x [rows, width].
HA_API int64_t hetero_attn_cpu_reduce_scatter(HaGroup* group, const void* x, void* out, int64_t rows, int64_t width, int32_t dtype,
                                              int64_t wanted);

// Rank r's x is part_bytes[r] long, `outer` rows of part_bytes[r] / outer; out has `outer` rows, each the ranks' rows one after the other.
HA_API int64_t hetero_attn_cpu_all_gather(HaGroup* group, const void* x, void* out, const int64_t* part_bytes, int64_t outer,
                                          int64_t wanted);

// x [bytes] of rank src, to every rank's x.
HA_API int64_t hetero_attn_cpu_broadcast(HaGroup* group, void* x, int64_t bytes, int32_t src, int64_t wanted);

HA_API int64_t hetero_attn_cpu_barrier(HaGroup* group, int64_t wanted);

// Communicator.all_reduce_rms_norm: x [tokens, channels] of `dtype` -> out, the same shape and dtype. residual [own rows, channels] and
// the weights [channels] have dtypes of their own (fp32, fp16, bf16); post_weight may be null. out may be x.
HA_API int64_t hetero_attn_cpu_all_reduce_rms_norm(HaGroup* group, void* x, void* out, int64_t tokens, int64_t channels, int32_t dtype,
                                                   void* residual, int32_t residual_dtype, const void* weight, int32_t weight_dtype,
                                                   const void* post_weight, int32_t post_dtype, double eps, double weight_offset,
                                                   int64_t wanted);

// The rank that made another call, after -2.
HA_API int32_t hetero_attn_cpu_group_odd(HaGroup* group);
}
