// Low-bit payloads (hetero_attn/collectives/codec/definition.py is their meaning, after arXiv 2411.07942 section 3): pack and unpack.
// A true division, not a product with the reciprocal, and no contraction of q · scale + sum: every step rounds as the definition's does, so
// that ranks with and without this object hold the same bits. Byte j of a group of 32 holds values j and j + 16: halves of vectors, no shuffle.
#include "codec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "abi.h"
#include "codec_lanes.h"

namespace ha {
namespace {

constexpr int GROUP = 32, HALF = GROUP / 2;
constexpr int TILE = 2048;                                               // features quantised at a time: 8 KiB of fp32 and 2 of q in L1

// ---- nibbles of a short last group of n values: byte j holds j and j + (n + 1) / 2 ----
inline void pack_tail(const int8_t* q, int n, uint8_t* body) {
    const int half = (n + 1) / 2;
    for (int j = 0; j < half; ++j) body[j] = (q[j] & 15) | (half + j < n ? (q[half + j] & 15) << 4 : 0);
}
inline void unpack_tail(const uint8_t* body, int n, int8_t* q) {
    const int half = (n + 1) / 2;
    for (int j = 0; j < half; ++j) {
        q[j] = (int8_t)(body[j] << 4) >> 4;
        if (half + j < n) q[half + j] = (int8_t)body[j] >> 4;
    }
}

// ---- groups with scales of their own ----
inline float group_scale(int32_t largest_bits, float steps, bf16* scale) {       // what to divide by: Inf for a group of zeros
    float largest;
    std::memcpy(&largest, &largest_bits, 4);
    from_float(largest / steps, scale);
    if (to_float(*scale) < 0x1p-126f) scale->bits = 0;
    return scale->bits ? to_float(*scale) : __builtin_inff();
}

template <int BITS, class T>
bool pack_groups(const T* values, int64_t count, uint8_t* body) {
    constexpr int V = GROUP / W;                                         // vectors in a group
    constexpr float STEPS = BITS == 4 ? 7.0f : 127.0f;
    bf16 scale;
    uint8_t* out = body + 2 * ((count + GROUP - 1) / GROUP);
    int32_t worst = 0;
    for (int64_t i = 0; i < count; i += GROUP) {
        const int n = (int)std::min<int64_t>(GROUP, count - i);
        float padded[GROUP];
        vf x[V];
        vi largest = {};
        if (n < GROUP) {
            std::memset(padded, 0, sizeof padded);
            for (int j = 0; j < n; ++j) padded[j] = to_float(values[i + j]);
        }
        for (int v = 0; v < V; ++v) {
            x[v] = n < GROUP ? load(padded + v * W) : load(values + i + v * W);
            largest = max_bits(largest, bits_of(x[v]) & 0x7fffffff);
        }
        const int32_t top = widest(largest);
        worst = std::max(worst, top);
        const vf divisor = splat(group_scale(top, STEPS, &scale));
        std::memcpy(body + 2 * (i / GROUP), &scale, 2);
        vi q[V];
        for (int v = 0; v < V; ++v) q[v] = rounded_bits(clamp(x[v] / divisor, -STEPS, STEPS));
        if (n < GROUP) {
            int8_t bytes[GROUP];
            for (int v = 0; v < V; ++v) narrow(q[v], (uint8_t*)bytes + v * W);
            BITS == 4 ? pack_tail(bytes, n, out) : (void)std::memcpy(out, bytes, n);
        } else if (BITS == 4) {
            for (int v = 0; v < V / 2; ++v) narrow((q[v] & 15) | ((q[v + V / 2] & 15) << 4), out + v * W);
            out += HALF;
        } else {
            for (int v = 0; v < V; ++v) narrow(q[v], out + v * W);
            out += GROUP;
        }
    }
    return worst < 0x7f800000;
}

inline void put(float* out, vf value, bool accumulate) {
    store(out, accumulate ? load(out) + apart(value) : value);
}

template <int BITS>
void unpack_groups(const uint8_t* body, int64_t count, float* out, bool accumulate) {
    constexpr int V = GROUP / W;
    const uint8_t* packed = body + 2 * ((count + GROUP - 1) / GROUP);
    for (int64_t i = 0; i < count; i += GROUP) {
        const int n = (int)std::min<int64_t>(GROUP, count - i);
        bf16 scale;
        std::memcpy(&scale, body + 2 * (i / GROUP), 2);
        const vf step = splat(to_float(scale));
        if (n < GROUP) {
            int8_t q[GROUP];
            BITS == 4 ? unpack_tail(packed, n, q) : (void)std::memcpy(q, packed, n);
            for (int j = 0; j < n; ++j) {
                const float value = apart((float)q[j] * to_float(scale));
                out[i + j] = accumulate ? out[i + j] + value : value;
            }
        } else if (BITS == 4) {
            for (int v = 0; v < V / 2; ++v) {
                const vi both = widen(packed + v * W);
                put(out + i + v * W, to_floats((both << 28) >> 28) * step, accumulate);
                put(out + i + (v + V / 2) * W, to_floats((both << 24) >> 28) * step, accumulate);
            }
            packed += HALF;
        } else {
            for (int v = 0; v < V; ++v) put(out + i + v * W, to_floats((widen(packed + v * W) << 24) >> 24) * step, accumulate);
            packed += GROUP;
        }
    }
}

// ---- features with static scales: a stream of q without the outliers, whatever row it comes from ----
struct NibbleWriter {
    uint8_t* out;
    int held = 0;
    int8_t q[2 * TILE + 64];

    void flush(bool last) {
        int done = 0;
        for (; done + GROUP <= held; done += GROUP, out += HALF) pack_bytes(q + done, out);
        if (last && done < held) pack_tail(q + done, held - done, out);
        else std::memmove(q, q + done, held - done);
        held = last ? 0 : held - done;
    }
};

struct NibbleReader {
    const uint8_t* in;
    int64_t left;                                                        // q that have not been unpacked
    int start = 0, end = 0;
    int8_t q[2 * TILE + 64];

    void fill(int wanted) {                                              // at least `wanted` q behind start, and 64 bytes to read beyond
        std::memmove(q, q + start, end - start);
        end -= start, start = 0;
        for (; end < wanted && left >= GROUP; end += GROUP, left -= GROUP, in += HALF) unpack_bytes(in, q + end);
        if (end < wanted) {
            unpack_tail(in, (int)left, q + end);
            end += (int)left, left = 0;
        }
    }
};

inline void copy_run(int8_t* to, const int8_t* from, int64_t n) {        // runs are about 63 long: one copy of 64 where that is enough
    if (n <= 64) std::memcpy(to, from, 64);
    else std::memcpy(to, from, n);
}

// Calls run(i, f, n) for the runs of the call's values that lie in one row: i the first's place in the call, f its feature.
template <class Run>
void rows_of(int64_t first, int64_t count, int64_t features, Run run) {
    int64_t f = first % features;
    for (int64_t i = 0; i < count; f = 0) {
        const int64_t n = std::min(features - f, count - i);
        run(i, f, n);
        i += n;
    }
}

// The same in tiles of n <= TILE.
template <class Tile>
void tiles_of(int64_t i, int64_t f, int64_t n, Tile tile) {
    for (int64_t j = 0; j < n; j += TILE) tile(i + j, f + j, (int)std::min<int64_t>(TILE, n - j));
}

// What a row's steps are divided by so that the largest is 7 of them: its factor, or Inf for a row that is its mean.
template <class T>
float row_factor(const T* x, int64_t n, const float* scale, const float* mean, bf16* factor) {
    vf largest = {};
    float top = 0.0f;
    int64_t j = 0;
    for (; j + W <= n; j += W) largest = max((vf)((vi)((load(x + j) - load(mean + j)) / load(scale + j)) & 0x7fffffff), largest);
    for (; j < n; ++j) top = std::max(top, std::fabs((to_float(x[j]) - mean[j]) / scale[j]));
    for (int lane = 0; lane < W; ++lane) top = std::max(top, largest[lane]);
    from_float(std::min(top, 1e38f) / 7.0f, factor);
    if (to_float(*factor) < 0x1p-126f) factor->bits = 0;
    return factor->bits ? to_float(*factor) : __builtin_inff();
}

template <class T>
int64_t pack_features(const T* values, int64_t first, int64_t count, int64_t features, int64_t outliers, const float* scale,
                      const float* mean, const int32_t* outlier, int64_t wide, int64_t rows, uint8_t* body) {
    NibbleWriter writer;
    uint8_t* factors = body + 2 * wide;
    writer.out = factors + 2 * rows;
    int64_t saturated = 0;
    vi largest = {}, beyond = {};
    int32_t worst = 0;
    int8_t q[TILE + 64];
    float divisor = 1.0f;
    auto tile = [&](int64_t i, int64_t f, int n) {
        int j = 0;
        for (; j + W <= n; j += W) {
            const vf x = load(values + i + j);
            largest = max_bits(largest, bits_of(x) & 0x7fffffff);
            vf steps = (x - load(mean + f + j)) / load(scale + f + j);
            if (rows) steps = steps / divisor;
            beyond += (vi)(steps >= 7.5f) + (vi)(steps < -8.5f);         // what rounds to 8 or -9: halves go to the even number
            narrow(rounded_bits(clamp(steps, -8.0f, 7.0f)), (uint8_t*)q + j);
        }
        for (; j < n; ++j) {
            const float x = to_float(values[i + j]);
            float steps = (x - mean[f + j]) / scale[f + j];
            if (rows) steps = steps / divisor;
            worst = std::max(worst, magnitude_bits(x));
            saturated += steps >= 7.5f || steps < -8.5f;
            q[j] = (int8_t)__builtin_rintf(std::min(std::max(steps, -8.0f), 7.0f));
        }
        const int32_t* next = std::lower_bound(outlier, outlier + outliers, (int32_t)f);
        for (j = 0; j < n;) {
            const int stop = next < outlier + outliers && *next < f + n ? (int)(*next - f) : n;
            copy_run(writer.q + writer.held, q + j, stop - j);
            writer.held += stop - j;
            if (stop < n) {
                bf16 kept;
                from_float(to_float(values[i + stop]), &kept);
                if ((kept.bits & 0x7fff) == 0x7f80) --kept.bits, ++saturated;    // rounded to Inf: the largest bf16 instead
                std::memcpy(body, &kept, 2);
                body += 2, ++next;
            }
            j = stop + 1;
        }
        writer.flush(false);
    };
    rows_of(first, count, features, [&](int64_t i, int64_t f, int64_t n) {
        if (rows) {
            bf16 factor;
            divisor = row_factor(values + i, n, scale + f, mean + f, &factor);
            std::memcpy(factors, &factor, 2);
            factors += 2;
        }
        tiles_of(i, f, n, tile);
    });
    writer.flush(true);
    for (int lane = 0; lane < W; ++lane) saturated -= beyond[lane];
    return std::max(worst, widest(largest)) < 0x7f800000 ? saturated : -1;
}

void unpack_features(const uint8_t* body, int64_t first, int64_t count, int64_t features, int64_t outliers, const float* step,
                     const float* mean, const int32_t* outlier, int64_t wide, int64_t rows, float* out, bool accumulate) {
    NibbleReader reader;
    const uint8_t* factors = body + 2 * wide;
    reader.in = factors + 2 * rows;
    reader.left = count - wide;
    int8_t q[TILE + 64];
    std::memset(reader.q, 0, sizeof reader.q);
    float factor = 1.0f;
    auto tile = [&](int64_t i, int64_t f, int n) {
        const int32_t *begin = std::lower_bound(outlier, outlier + outliers, (int32_t)f), *next = begin;
        reader.fill((int)std::min<int64_t>(n, reader.end - reader.start + reader.left));
        int j = 0;
        while (j < n) {
            const int stop = next < outlier + outliers && *next < f + n ? (int)(*next - f) : n;
            copy_run(q + j, reader.q + reader.start, stop - j);
            reader.start += stop - j;
            if (stop < n) q[stop] = 0, ++next;
            j = stop + 1;
        }
        float held[TILE];                                                // at the outliers' places, before their tables say nothing there
        const int32_t* end = next;
        for (next = begin; next < end; ++next) held[next - begin] = accumulate ? out[i + *next - f] : 0.0f;
        for (j = 0; j + W <= n; j += W) {
            const vf each = load(step + f + j) * factor;
            const vf product = apart(to_floats((widen((uint8_t*)q + j) << 24) >> 24) * each);
            put(out + i + j, product + load(mean + f + j), accumulate);
        }
        for (; j < n; ++j) {
            const float value = apart((float)q[j] * apart(step[f + j] * factor)) + mean[f + j];
            out[i + j] = accumulate ? out[i + j] + value : value;
        }
        for (next = begin; next < end; ++next, body += 2) {
            bf16 kept;
            std::memcpy(&kept, body, 2);
            out[i + *next - f] = accumulate ? held[next - begin] + to_float(kept) : to_float(kept);
        }
    };
    rows_of(first, count, features, [&](int64_t i, int64_t f, int64_t n) {
        if (rows) {
            bf16 each;
            std::memcpy(&each, factors, 2);
            factors += 2, factor = to_float(each);
        }
        tiles_of(i, f, n, tile);
    });
}

}  // namespace
}  // namespace ha

extern "C" int64_t hetero_attn_cpu_pack_groups(const void* values, int32_t dtype, int64_t count, int32_t bits, uint8_t* body) {
    auto run = [&](auto* x) { return bits == 4 ? ha::pack_groups<4>(x, count, body) : ha::pack_groups<8>(x, count, body); };
    switch (dtype) {
        case HA_F32: return run(static_cast<const float*>(values)) ? 0 : -1;
        case HA_F16: return run(static_cast<const ha::f16*>(values)) ? 0 : -1;
        case HA_BF16: return run(static_cast<const ha::bf16*>(values)) ? 0 : -1;
    }
    return -2;
}

extern "C" void hetero_attn_cpu_unpack_groups(const uint8_t* body, int64_t count, int32_t bits, float* out, int32_t accumulate) {
    bits == 4 ? ha::unpack_groups<4>(body, count, out, accumulate) : ha::unpack_groups<8>(body, count, out, accumulate);
}

extern "C" int64_t hetero_attn_cpu_pack_features(const void* values, int32_t dtype, int64_t first, int64_t count, int64_t features,
                                                 int64_t outliers, const float* scale, const float* mean, const int32_t* outlier,
                                                 int64_t wide, int64_t rows, uint8_t* body) {
    auto run = [&](auto* x) { return ha::pack_features(x, first, count, features, outliers, scale, mean, outlier, wide, rows, body); };
    switch (dtype) {
        case HA_F32: return run(static_cast<const float*>(values));
        case HA_F16: return run(static_cast<const ha::f16*>(values));
        case HA_BF16: return run(static_cast<const ha::bf16*>(values));
    }
    return -2;
}

extern "C" void hetero_attn_cpu_unpack_features(const uint8_t* body, int64_t first, int64_t count, int64_t features, int64_t outliers,
                                                const float* step, const float* mean, const int32_t* outlier, int64_t wide, int64_t rows,
                                                float* out, int32_t accumulate) {
    ha::unpack_features(body, first, count, features, outliers, step, mean, outlier, wide, rows, out, accumulate);
}
