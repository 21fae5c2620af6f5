// The collectives in shared memory: what each lays out, sums and takes back. shared_group.h is how ranks wait, shared_pieces.h the
// pipeline of the reducing ones. A small all-reduce is one step (everyone lays out all of x and sums all of it); gather and broadcast
// take one step a chunk; the others one more. Sums and rows are made by the calling thread: ranks are processes, and use the cores so.
#include "shared_memory.h"

#include <cstdlib>
#include <new>

#include "abi.h"
#include "shared_norm.h"
#include "shared_pieces.h"
#include "shared_sum.h"

namespace ha {
namespace {

template <class T>
int64_t all_reduce(HaGroup& g, T* x, int64_t count, int32_t dtype, int64_t wanted) {
    const int64_t bytes = count * sizeof(T);
    Record record = {ALL_REDUCE, dtype, count, 0, -1, -1, 0, 0, wanted};
    if (bytes <= g.one_shot_bytes && bytes <= g.stage_bytes) {
        std::memcpy(g.stage(g.rank, g.step + 1), x, bytes);
        g.post(&record);
        if (!g.wait()) return -1;
        if (!g.agree()) return -2;
        Ends ends;
        ends.froms = g.world_size;
        ends.tos = 1;
        ends.to[0] = reinterpret_cast<char*>(x);
        for (int r = 0; r < g.world_size; ++r) ends.from[r] = r == g.rank ? reinterpret_cast<char*>(x) : g.stage(r, g.step);
        sum_pieces(ends, count, x);
        return g.most_wanted();
    }
    const Slices slices((bytes + CACHE_LINE - 1) / CACHE_LINE, CACHE_LINE, bytes, CACHE_LINE, g.world_size, g.stage_bytes);
    char* data = reinterpret_cast<char*>(x);
    return reduce_pieces(g, record, slices, data, data, true,
                         [&](const Ends& ends, int64_t, int64_t size) { sum_pieces(ends, size / (int64_t)sizeof(T), x); });
}

template <class T>
int64_t reduce_scatter(HaGroup& g, const T* x, T* out, int64_t rows, int64_t width, int32_t dtype, int64_t wanted) {
    Record record = {REDUCE_SCATTER, dtype, rows, width, -1, -1, 0, 0, wanted};
    const int64_t row = width * sizeof(T);
    const Slices slices(rows, row, rows * row, CACHE_LINE, g.world_size, g.stage_bytes);
    return reduce_pieces(g, record, slices, reinterpret_cast<const char*>(x), reinterpret_cast<char*>(out), false,
                         [&](const Ends& ends, int64_t, int64_t size) { sum_pieces(ends, size / (int64_t)sizeof(T), out); });
}

// Bytes [from, from + size) of a part that is `row` bytes a row, into rows of `pitch` bytes.
inline void place(char* out, int64_t pitch, int64_t row, int64_t from, const char* part, int64_t size) {
    while (size > 0) {
        const int64_t within = from % row, here = std::min(row - within, size);
        std::memcpy(out + from / row * pitch + within, part, here);
        from += here;
        part += here;
        size -= here;
    }
}

int64_t all_gather(HaGroup& g, const char* x, char* out, const int64_t* part_bytes, int64_t outer, int64_t wanted) {
    int64_t longest = 0, pitch = 0, column[MAX_RANKS];
    for (int r = 0; r < g.world_size; ++r) {
        longest = std::max(longest, part_bytes[r]);
        column[r] = pitch;
        pitch += part_bytes[r] / std::max<int64_t>(outer, 1);
    }
    // All ranks must see the same parts: equal sums of unlike ones would leave stale bytes in the result.
    uint64_t parts = 0xcbf29ce484222325;
    for (int r = 0; r < g.world_size; ++r) parts = (parts ^ (uint64_t)part_bytes[r]) * 0x100000001b3;
    Record record = {ALL_GATHER, (int32_t)std::min<int64_t>(outer, INT32_MAX), pitch, (int64_t)parts, -1, -1, 0, 0, wanted};
    const int64_t own = part_bytes[g.rank], stage = g.stage_bytes, chunks = std::max<int64_t>((longest + stage - 1) / stage, 1);
    auto lay_out = [&](int64_t k) {
        if (k * stage < own) std::memcpy(g.stage(g.rank, g.step + 1), x + k * stage, std::min(stage, own - k * stage));
    };
    lay_out(0);
    g.post(&record);
    place(out + column[g.rank], pitch, std::max<int64_t>(own / std::max<int64_t>(outer, 1), 1), 0, x, own);
    for (int64_t k = 0; k < chunks; ++k) {
        if (!g.wait()) return -1;
        if (k == 0) {
            if (!g.agree()) return -2;
            wanted = g.most_wanted();
        }
        if (k + 1 < chunks) lay_out(k + 1);
        for (int r = 0; r < g.world_size; ++r)
            if (r != g.rank && k * stage < part_bytes[r])
                place(out + column[r], pitch, part_bytes[r] / outer, k * stage, g.stage(r, g.step), std::min(stage, part_bytes[r] - k * stage));
        if (k + 1 < chunks) g.post();
    }
    return wanted;
}

int64_t broadcast(HaGroup& g, char* x, int64_t bytes, int32_t src, int64_t wanted) {
    Record record = {BROADCAST, 0, bytes, src, -1, -1, 0, 0, wanted};
    const int64_t stage = g.stage_bytes, chunks = std::max<int64_t>((bytes + stage - 1) / stage, 1);
    auto size = [&](int64_t k) { return std::min(stage, bytes - k * stage); };
    auto lay_out = [&](int64_t k) {
        if (g.rank == src) std::memcpy(g.stage(src, g.step + 1), x + k * stage, size(k));
    };
    lay_out(0);
    g.post(&record);
    for (int64_t k = 0; k < chunks; ++k) {
        if (!g.wait()) return -1;
        if (k == 0) {
            if (!g.agree()) return -2;
            wanted = g.most_wanted();
        }
        if (k + 1 < chunks) lay_out(k + 1);
        if (g.rank != src) std::memcpy(x + k * stage, g.stage(src, g.step), size(k));
        if (k + 1 < chunks) g.post();
    }
    return wanted;
}

// weight as fp32: itself, or converted into `room`. Null: unknown dtype.
const float* widened(const void* weight, int32_t dtype, int64_t channels, float* room) {
    auto convert = [&](auto* from) {
        int64_t i = 0;
        for (; i + W <= channels; i += W) store(room + i, load(from + i));
        for (; i < channels; ++i) room[i] = to_float(from[i]);
        return room;
    };
    switch (dtype) {
        case HA_F32: return static_cast<const float*>(weight);
        case HA_F16: return convert(static_cast<const f16*>(weight));
        case HA_BF16: return convert(static_cast<const bf16*>(weight));
    }
    return nullptr;
}

struct Norm {
    int64_t tokens, channels, wanted;
    int32_t dtype, residual_dtype;
    void *x, *out, *residual;
    NormWeights with;
    float* y;
};

template <class T, class R>
int64_t all_reduce_rms_norm(HaGroup& g, const Norm& call) {
    const int64_t row = call.channels * sizeof(T);
    const Slices slices(call.tokens, row, call.tokens * row, row, g.world_size, g.stage_bytes);
    if (!slices.piece) return -3;
    // What must agree beyond the shape: the rounding of rows made by different ranks.
    Record record = {ALL_REDUCE_RMS_NORM, call.dtype | call.residual_dtype << 8 | (call.with.post_weight != nullptr) << 16,
                     call.tokens, call.channels, -1, -1, 0, 0, call.wanted};
    R* residual = static_cast<R*>(call.residual);
    return reduce_pieces(g, record, slices, static_cast<char*>(call.x), static_cast<char*>(call.out), true,
                         [&](Ends ends, int64_t from, int64_t size) {
                             int64_t first = (from - slices.start[g.rank]) / row;
                             for (int64_t i = 0; i < size / row; ++i) {
                                 reduce_add_norm_row<T, R>(ends, residual + (first + i) * call.channels, call.with, call.channels, call.y);
                                 for (int r = 0; r < ends.froms; ++r) ends.from[r] += row;
                                 for (int d = 0; d < ends.tos; ++d) ends.to[d] += row;
                             }
                         });
}

template <class T>
int64_t by_residual(HaGroup& g, const Norm& call) {
    switch (call.residual_dtype) {
        case HA_F32: return all_reduce_rms_norm<T, float>(g, call);
        case HA_F16: return all_reduce_rms_norm<T, f16>(g, call);
        case HA_BF16: return all_reduce_rms_norm<T, bf16>(g, call);
    }
    return -3;
}

// function(null pointer of the dtype's element type), or -3.
template <class Function>
int64_t by_dtype(int32_t dtype, const Function& function) {
    switch (dtype) {
        case HA_F32: return function((float*)nullptr);
        case HA_F16: return function((f16*)nullptr);
        case HA_BF16: return function((bf16*)nullptr);
        case HA_F64: return function((double*)nullptr);
        case HA_U8: return function((uint8_t*)nullptr);
        case HA_I8: return function((int8_t*)nullptr);
        case HA_I16: return function((int16_t*)nullptr);
        case HA_I32: return function((int32_t*)nullptr);
        case HA_I64: return function((int64_t*)nullptr);
    }
    return -3;
}

}  // namespace
}  // namespace ha

HaGroup* hetero_attn_cpu_group_open(int32_t rank, int32_t world_size, int64_t stage_bytes, int64_t one_shot_bytes, int32_t crowded,
                                    HaWaiting waiting) {
    HaGroup* group = new (std::nothrow) HaGroup();
    if (!group) return nullptr;
    group->rank = rank;
    group->world_size = world_size;
    group->stage_bytes = stage_bytes;
    group->one_shot_bytes = one_shot_bytes;
    group->crowded = crowded != 0;
    group->waiting = waiting;
    return group;
}

void hetero_attn_cpu_group_close(HaGroup* group) {
    if (group) std::free(group->scratch);
    delete group;
}

int hetero_attn_cpu_group_add(HaGroup* group, const uint64_t* bases, int64_t bytes) {
    if (group->segments == ha::MAX_SEGMENTS) return 1;
    for (int r = 0; r < group->world_size; ++r) group->bases[group->segments][r] = reinterpret_cast<char*>(bases[r]);
    group->bytes[group->segments++] = bytes;
    return 0;
}

int64_t hetero_attn_cpu_group_reserved(int64_t stage_bytes) { return HaGroup::reserved(stage_bytes); }

int32_t hetero_attn_cpu_group_odd(HaGroup* group) { return group->odd; }

int64_t hetero_attn_cpu_all_reduce(HaGroup* group, void* x, int64_t count, int32_t dtype, int64_t wanted) {
    return ha::by_dtype(dtype, [&](auto* type) { return ha::all_reduce(*group, static_cast<decltype(type)>(x), count, dtype, wanted); });
}

int64_t hetero_attn_cpu_reduce_scatter(HaGroup* group, const void* x, void* out, int64_t rows, int64_t width, int32_t dtype,
                                       int64_t wanted) {
    return ha::by_dtype(dtype, [&](auto* type) {
        using Pointer = decltype(type);
        return ha::reduce_scatter(*group, static_cast<Pointer>(const_cast<void*>(x)), static_cast<Pointer>(out), rows, width, dtype, wanted);
    });
}

int64_t hetero_attn_cpu_all_gather(HaGroup* group, const void* x, void* out, const int64_t* part_bytes, int64_t outer, int64_t wanted) {
    return ha::all_gather(*group, static_cast<const char*>(x), static_cast<char*>(out), part_bytes, outer, wanted);
}

int64_t hetero_attn_cpu_broadcast(HaGroup* group, void* x, int64_t bytes, int32_t src, int64_t wanted) {
    return ha::broadcast(*group, static_cast<char*>(x), bytes, src, wanted);
}

int64_t hetero_attn_cpu_barrier(HaGroup* group, int64_t wanted) {
    ha::Record record = {ha::BARRIER, 0, 0, 0, -1, -1, 0, 0, wanted};
    group->post(&record);
    if (!group->wait()) return -1;
    return group->agree() ? group->most_wanted() : -2;
}

int64_t hetero_attn_cpu_all_reduce_rms_norm(HaGroup* group, void* x, void* out, int64_t tokens, int64_t channels, int32_t dtype,
                                            void* residual, int32_t residual_dtype, const void* weight, int32_t weight_dtype,
                                            const void* post_weight, int32_t post_dtype, double eps, double weight_offset,
                                            int64_t wanted) {
    if (group->scratch_floats < 3 * channels) {                          // a row, and two weights as fp32
        float* more = static_cast<float*>(std::realloc(group->scratch, 3 * channels * sizeof(float)));
        if (!more) return -3;
        group->scratch = more;
        group->scratch_floats = 3 * channels;
    }
    float* y = group->scratch;
    const float* wide = ha::widened(weight, weight_dtype, channels, y + channels);
    const float* post = post_weight ? ha::widened(post_weight, post_dtype, channels, y + 2 * channels) : nullptr;
    if (!wide || (post_weight && !post)) return -3;
    ha::Norm call = {tokens, channels, wanted, dtype, residual_dtype, x, out, residual, {wide, post, (float)eps, (float)weight_offset}, y};
    switch (dtype) {
        case HA_F32: return ha::by_residual<float>(*group, call);
        case HA_F16: return ha::by_residual<ha::f16>(*group, call);
        case HA_BF16: return ha::by_residual<ha::bf16>(*group, call);
    }
    return -3;
}
