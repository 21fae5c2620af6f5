// The two products of decode, q · kᵀ and p · v, for up to eight rows that share every key. Lanes run along the head dimension, so keys and
// values are read as they lie, once, and are converted once for all rows: with few rows the work is reading memory, and what is done for
// each element between two loads decides whether memory is the limit. Blocks of rows x keys (rows x columns) of sums stay in registers.
#pragma once
#include <utility>

#include "vec.h"

namespace ha {

constexpr int64_t DECODE_ROWS = 8;           // up to so many rows are the decode kernel's

namespace decode {

constexpr int64_t BLOCK = 64;                // keys of one block, at most: the scores' row length
constexpr int64_t STRIP = 16;                // keys whose sums are reduced together; divides every block

// How a row is cut into vectors. A bf16 is the upper half of a float: a vector of bf16 pairs gives the even elements by a shift and the odd
// ones by a mask, without a shuffle; so bf16 comes in chunks of two vectors, evens and odds, and q and o are kept in that order.
template <class T> constexpr int PARTS = 1;
template <> inline constexpr int PARTS<bf16> = 2;
template <class T> constexpr int64_t CHUNK = PARTS<T> * W;               // elements

typedef uint32_t vu_unaligned __attribute__((vector_size(W * 4), aligned(2), may_alias));

template <int PART> inline vf load_part(const float* p) { return load(p); }
template <int PART> inline vf load_part(const f16* p) { return load(p); }
template <int PART> inline vf load_part(const bf16* p) {
    vu pairs = *reinterpret_cast<const vu_unaligned*>(p);
    return PART == 0 ? (vf)(pairs << 16) : (vf)(pairs & 0xffff0000u);
}
inline vi load_lanes(const int32_t* p) {
    vi x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
// Where element e of a chunk stands in its vectors.
template <class T> constexpr int64_t place(int64_t e) { return PARTS<T> == 2 ? e % 2 * W + e / 2 : e; }

// A width of `full` whole chunks; a rest is read as one more chunk that ends where the row ends, so that no load leaves the row.
struct Columns {
    int64_t full, rest;                      // rest: the last chunk's first element, -1: none
    int64_t chunks() const { return full + (rest >= 0); }
};
template <class T> Columns columns(int64_t width) { return {width / CHUNK<T>, width % CHUNK<T> ? width - CHUNK<T> : -1}; }

// Rows that will be needed next, asked for a few lines at a time while the arithmetic runs on what is here. Into the second-level cache: the
// first has miss buffers for two dozen lines, and who waits for one keeps the arithmetic waiting too (D2 fp32: 6.8 -> 4.5 ms, AMD Zen 4).
struct Lookahead {
    const void* const* rows = nullptr;
    int64_t left = 0, lines = 0, line = 0;   // rows to go, cache lines of a row, next line of the first

    template <class T> Lookahead(const T* const* p, int64_t n, int64_t width)
        : rows(reinterpret_cast<const void* const*>(p)), left(n), lines((width * (int64_t)sizeof(T) + 63) / 64) {}
    int64_t total() const { return left * lines - line; }
    void fetch_all() { fetch(total()); }
    void fetch(int64_t count) {
        for (; count > 0 && left > 0; --count) {
            __builtin_prefetch(static_cast<const char*>(*rows) + line * 64, 0, 2);
            if (++line == lines) line = 0, ++rows, --left;
        }
    }
};

// ---- W sums of W lanes: a transposing tree, lane i of the result is the sum of vector i ----
template <class Pick, int... I>
inline vf pick(vf a, vf b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, Pick::lane(I)...);
#else
    return __builtin_shuffle(a, b, (vi){Pick::lane(I)...});
#endif
}
template <int HIGH> struct Interleave { static constexpr int lane(int i) { return i / 4 * 4 + i % 4 / 2 + 2 * HIGH + i % 2 * W; } };
template <int HIGH> struct Join { static constexpr int lane(int i) { return i / 4 * 4 + i % 2 + 2 * HIGH + i % 4 / 2 * W; } };
template <int ODD> struct Quads { static constexpr int lane(int i) { return (i / 4 * 2 + ODD) * 4 + i % 4; } };

template <template <int> class Pick> inline vf fold(vf a, vf b) {
    constexpr std::make_integer_sequence<int, W> lanes{};
    return pick<Pick<0>>(a, b, lanes) + pick<Pick<1>>(a, b, lanes);
}

// A chunk of sums to the order of the elements.
template <int HALF> struct Zip { static constexpr int lane(int i) { return i % 2 * W + i / 2 + HALF * W / 2; } };
template <class T> void store_in_order(float* to, const float* chunk) {
    if constexpr (PARTS<T> == 1) return store(to, load(chunk));
    constexpr std::make_integer_sequence<int, W> lanes{};
    store(to, pick<Zip<0>>(load(chunk), load(chunk + W), lanes));
    store(to + W, pick<Zip<1>>(load(chunk), load(chunk + W), lanes));
}

// f(0), f(1) .. f(N - 1) with constants, so that arrays indexed by them are registers: no compiler's unrolling is relied on.
template <class F, int... I>
inline __attribute__((always_inline)) void unroll(F f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}
#define HA_UNROLL(N, i, ...) \
    unroll([&](auto i) __attribute__((always_inline)) { __VA_ARGS__ }, std::make_integer_sequence<int, N>{})

// ---- q · kᵀ ----
constexpr int keys_at_once(int rows) {       // rows x keys sums, the keys' vectors and one of q fit the registers
    if (VECTOR_REGISTERS == 32) return rows <= 6 ? 4 : 2;
    return rows <= 2 ? 4 : rows <= 6 ? 2 : 1;
}

template <class T, int R, int KEYS, int PART, bool REST>
inline __attribute__((always_inline)) void dot_part(const T* const (&k)[KEYS], int64_t column, const float* q, const int32_t* within,
                                                    vf (&sum)[KEYS][R]) {
    vf keys[KEYS];
    HA_UNROLL(KEYS, j, {
        keys[j] = load_part<PART>(k[j] + column);
        if (REST) keys[j] = (vf)((vi)keys[j] & load_lanes(within + PART * W));
    });
    HA_UNROLL(R, r, {
        vf row = load(q + (PART * R + r) * W);
        HA_UNROLL(KEYS, j, sum[j][r] = row * keys[j] + sum[j][r];);
    });
}
template <class T, int R, int KEYS, bool REST>
inline __attribute__((always_inline)) void dot_chunk(const T* const (&k)[KEYS], int64_t column, const float* q, const int32_t* within,
                                                     vf (&sum)[KEYS][R]) {
    dot_part<T, R, KEYS, 0, REST>(k, column, q, within, sum);
    if constexpr (PARTS<T> == 2) dot_part<T, R, KEYS, 1, REST>(k, column, q, within, sum);
}

// Sums are folded in two stages: those of keys taken together while they are in registers, then vectors of STRIP keys from memory.
constexpr int folded_at_once(int keys) { return keys < 4 ? keys : 4; }

// scores[r * BLOCK + j] = q[r] · k[j] for j < n. q [chunk][part][row][W]; k has KEYS - 1 valid pointers beyond n (any
// rows); within [CHUNK]: the lanes of the rest's chunk that the full ones do not have; sums [R][STRIP][W] is scratch. beside(j, KEYS) is
// called before keys [j, j + KEYS): what else is to be read meanwhile.
template <class T, int R, int KEYS, class Beside>
void score_block(const float* q, const T* const* k, int64_t n, Columns width, const int32_t* within, float* scores, float* sums,
                 const Beside& beside) {
    constexpr int FOLDED = folded_at_once(KEYS);
    for (int64_t strip = 0; strip < n; strip += STRIP) {
        int64_t count = n - strip < STRIP ? n - strip : STRIP;
        for (int64_t i = 0; i < count; i += KEYS) {
            beside(strip + i, KEYS);
            const T* rows[KEYS];
            HA_UNROLL(KEYS, j, rows[j] = k[strip + i + j];);
            vf sum[KEYS][R] = {};
            const float* part = q;
            for (int64_t column = 0; column < width.full * CHUNK<T>; column += CHUNK<T>, part += R * CHUNK<T>)
                dot_chunk<T, R, KEYS, false>(rows, column, part, nullptr, sum);
            if (width.rest >= 0) dot_chunk<T, R, KEYS, true>(rows, width.rest, part, within, sum);
            HA_UNROLL(KEYS / FOLDED, g, HA_UNROLL(R, r, {
                vf x = sum[g * FOLDED][r];
                if constexpr (FOLDED >= 2) x = fold<Interleave>(x, sum[g * FOLDED + 1][r]);
                if constexpr (FOLDED == 4) x = fold<Join>(x, fold<Interleave>(sum[g * FOLDED + 2][r], sum[g * FOLDED + 3][r]));
                store(sums + (r * (STRIP / FOLDED) + i / FOLDED + g) * W, x);
            }););
        }
        for (int r = 0; r < R; ++r)
            for (int64_t i = 0; i < count; i += W) {
                const float* from = sums + (r * STRIP + i) / FOLDED * W;
                vf x[W / 4];
                HA_UNROLL(W / 4, g, {
                    const float* p = from + g * (4 / FOLDED) * W;
                    if constexpr (FOLDED == 4) x[g] = load(p);
                    else if constexpr (FOLDED == 2) x[g] = fold<Join>(load(p), load(p + W));
                    else x[g] = fold<Join>(fold<Interleave>(load(p), load(p + W)), fold<Interleave>(load(p + 2 * W), load(p + 3 * W)));
                });
                if constexpr (W == 8) x[0] = fold<Quads>(x[0], x[1]);
                if constexpr (W == 16) x[0] = fold<Quads>(fold<Quads>(x[0], x[1]), fold<Quads>(x[2], x[3]));
                store(scores + r * BLOCK + strip + i, x[0]);
            }
    }
}

// ---- p · v ----
constexpr int vectors_at_once(int rows) {
    if (VECTOR_REGISTERS == 32) return rows <= 2 ? 8 : rows <= 6 ? 4 : 2;
    return rows == 1 ? 8 : rows <= 3 ? 4 : rows <= 6 ? 2 : 1;
}

// NV vectors of columns from `column` on (of which the first is part PART of its chunk), all rows, n keys.
template <class T, int R, int NV, int PART>
void weigh_columns(const float* p, const T* const* v, int64_t n, int64_t column, float* o, int64_t o_row, const float* keep,
                   Lookahead& ahead, int64_t lines) {
    vf sum[R][NV];
    HA_UNROLL(R, r, {
        vf scale = splat(keep[r]);
        HA_UNROLL(NV, x, sum[r][x] = load(o + r * o_row + x * W) * scale;);
    });
    Lookahead coming = ahead;
    for (int64_t begin = 0; begin < n; begin += 2) {                     // short bursts: a processor waits for two dozen lines at most
        coming.fetch(lines);
        int64_t end = n - begin < 2 ? n : begin + 2;
        for (int64_t j = begin; j < end; ++j) {
            const T* row = v[j] + column;
            vf values[NV];
            HA_UNROLL(NV, x, values[x] = load_part<(PART + x) % PARTS<T>>(row + x / PARTS<T> * CHUNK<T>););
            HA_UNROLL(R, r, {
                vf weight = splat(p[r * BLOCK + j]);
                HA_UNROLL(NV, x, sum[r][x] = values[x] * weight + sum[r][x];);
            });
        }
    }
    ahead = coming;
    HA_UNROLL(R, r, HA_UNROLL(NV, x, store(o + r * o_row + x * W, sum[r][x]);););
}

// As many passes of NV vectors as the chunks [chunk, end) hold, then of NV / 2 and so on. `o` is the rows' chunk 0.
template <class T, int R, int NV>
void weigh_chunks(const float* p, const T* const* v, int64_t n, int64_t chunk, int64_t end, int64_t column, float* o, int64_t o_row,
                  const float* keep, Lookahead& ahead, int64_t lines) {
    if constexpr (NV < PARTS<T>) {           // the registers hold one vector a row: evens, then odds
        for (; chunk < end; ++chunk, column += CHUNK<T>) {
            weigh_columns<T, R, 1, 0>(p, v, n, column, o + chunk * CHUNK<T>, o_row, keep, ahead, lines);
            weigh_columns<T, R, 1, 1>(p, v, n, column, o + chunk * CHUNK<T> + W, o_row, keep, ahead, lines);
        }
    } else {
        constexpr int64_t STEP = NV / PARTS<T>;
        for (; chunk + STEP <= end; chunk += STEP, column += STEP * CHUNK<T>)
            weigh_columns<T, R, NV, 0>(p, v, n, column, o + chunk * CHUNK<T>, o_row, keep, ahead, lines);
        if constexpr (STEP > 1) weigh_chunks<T, R, NV / 2>(p, v, n, chunk, end, column, o, o_row, keep, ahead, lines);
    }
}

// o[r] = o[r] * keep[r] + sum over j < n of p[r * BLOCK + j] * v[j]; o [R][o_row] in chunks.
template <class T, int R>
void weigh_block(const float* p, const T* const* v, int64_t n, Columns width, float* o, int64_t o_row, const float* keep, Lookahead ahead) {
    constexpr int NV = vectors_at_once(R);
    int64_t passes = (width.chunks() * PARTS<T> + NV - 1) / NV, lines = (ahead.total() * 2 + passes * n - 1) / (passes * n);
    weigh_chunks<T, R, NV>(p, v, n, 0, width.full, 0, o, o_row, keep, ahead, lines);
    if (width.rest >= 0) {
        constexpr int LAST = NV < PARTS<T> ? NV : PARTS<T>;
        weigh_chunks<T, R, LAST>(p, v, n, width.full, width.full + 1, width.rest, o, o_row, keep, ahead, lines);
    }
}

}  // namespace decode
}  // namespace ha
