// Sums over ranks: n sources, added one by one in rank order, written to one or several places. Only the element's index decides how it
// is computed, so whoever sums a piece gets the same bits.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vec.h"

namespace ha {

// Where a piece comes from and where its result goes: addresses of the piece's first element.
struct Ends {
    const char* from[64];
    char* to[64];
    int froms, tos;
};

template <class T, int N>
inline void sum_vectors(const Ends& ends, int64_t count) {
    constexpr int UNROLL = 4;
    const int n = N ? N : ends.froms;
    int64_t i = 0;
    auto block = [&](auto vectors) {
        constexpr int V = decltype(vectors)::value;
        vf total[V];
        for (int v = 0; v < V; ++v) total[v] = load(reinterpret_cast<const T*>(ends.from[0]) + i + v * W);
        for (int r = 1; r < n; ++r)
            for (int v = 0; v < V; ++v) total[v] += load(reinterpret_cast<const T*>(ends.from[r]) + i + v * W);
        for (int d = 0; d < ends.tos; ++d)
            for (int v = 0; v < V; ++v) store(reinterpret_cast<T*>(ends.to[d]) + i + v * W, total[v]);
        i += V * W;
    };
    while (i + UNROLL * W <= count) block(std::integral_constant<int, UNROLL>());
    while (i + W <= count) block(std::integral_constant<int, 1>());
    for (; i < count; ++i) {
        float total = to_float(reinterpret_cast<const T*>(ends.from[0])[i]);
        for (int r = 1; r < n; ++r) total += to_float(reinterpret_cast<const T*>(ends.from[r])[i]);
        for (int d = 0; d < ends.tos; ++d) from_float(total, reinterpret_cast<T*>(ends.to[d]) + i);
    }
}

// Integers wrap around: U is the unsigned twin, whose overflow is defined.
template <class T, class U>
inline void sum_plain(const Ends& ends, int64_t count) {
    constexpr int BLOCK = 256;
    U total[BLOCK], value[BLOCK];
    for (int64_t i = 0; i < count; i += BLOCK) {
        const int64_t size = count - i < BLOCK ? count - i : BLOCK;
        const int64_t at = i * sizeof(T), bytes = size * sizeof(T);
        std::memcpy(total, ends.from[0] + at, bytes);
        for (int r = 1; r < ends.froms; ++r) {
            std::memcpy(value, ends.from[r] + at, bytes);
            for (int64_t k = 0; k < size; ++k) total[k] += value[k];
        }
        for (int d = 0; d < ends.tos; ++d) std::memcpy(ends.to[d] + at, total, bytes);
    }
}

template <class T>
inline void sum_floats(const Ends& ends, int64_t count) {
    ends.froms == 2 ? sum_vectors<T, 2>(ends, count) : sum_vectors<T, 0>(ends, count);
}

inline void sum_pieces(const Ends& ends, int64_t count, float*) { sum_floats<float>(ends, count); }
inline void sum_pieces(const Ends& ends, int64_t count, f16*) { sum_floats<f16>(ends, count); }
inline void sum_pieces(const Ends& ends, int64_t count, bf16*) { sum_floats<bf16>(ends, count); }
inline void sum_pieces(const Ends& ends, int64_t count, double*) { sum_plain<double, double>(ends, count); }
inline void sum_pieces(const Ends& ends, int64_t count, uint8_t*) { sum_plain<uint8_t, uint8_t>(ends, count); }
inline void sum_pieces(const Ends& ends, int64_t count, int8_t*) { sum_plain<int8_t, uint8_t>(ends, count); }
inline void sum_pieces(const Ends& ends, int64_t count, int16_t*) { sum_plain<int16_t, uint16_t>(ends, count); }
inline void sum_pieces(const Ends& ends, int64_t count, int32_t*) { sum_plain<int32_t, uint32_t>(ends, count); }
inline void sum_pieces(const Ends& ends, int64_t count, int64_t*) { sum_plain<int64_t, uint64_t>(ends, count); }

}  // namespace ha
