// The shared-memory collectives with threads for ranks, so that a sanitizer sees all of their memory: a random sequence of calls, the
// same on every rank, with tensors in the heap or private as each rank happens to have them, and every result checked. Ranks are held up
// at random. Usage: driver RANKS CALLS SEED. Prints "ok CALLS" and ends with 0, or says what was wrong.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cpu/shared_memory.h"

namespace {

constexpr int64_t STAGE = 8192, HEAP = 1 << 18, ONE_SHOT = 1024;
enum { F32 = 1 };
int ranks, calls;
unsigned seed;
std::vector<char*> segments;

float value(int call, int rank, int64_t i) { return (float)((call * 31 + rank * 7 + i * 13) % 64) - 31.5f; }

struct Rank {
    int me;
    HaGroup* group;
    std::mt19937 own;                        // this rank's: where its tensors lie, how late it is
    std::vector<float> memory;
    char* heap;

    // A tensor of n floats, in the heap or not, at any offset that floats may have.
    float* tensor(int64_t n, int which) {
        size_t shift = own() % 5;
        if (own() % 2) return reinterpret_cast<float*>(heap + which * HEAP / 2) + shift;
        memory.resize(2 * HEAP / sizeof(float));
        return memory.data() + which * memory.size() / 2 + shift + 0 * n;
    }
    [[noreturn]] void wrong(int call, const char* what, int64_t i, double got, double expected) {
        std::printf("rank %d call %d: %s[%lld] is %.9g, expected %.9g\n", me, call, what, (long long)i, got, expected);
        std::fflush(stdout);
        std::_Exit(1);
    }
    void check(int call, const char* what, int64_t i, float got, double expected, double tolerance = 0) {
        if (!(std::fabs(got - expected) <= tolerance)) wrong(call, what, i, got, expected);
    }
    void done(int call, const char* what, int64_t status) {
        if (status < 0) wrong(call, what, 0, (double)status, 0);
    }
    double sum(int call, int64_t i) {
        double total = 0;
        for (int r = 0; r < ranks; ++r) total += value(call, r, i);
        return total;
    }
    void fill(float* x, int call, int64_t n) {
        for (int64_t i = 0; i < n; ++i) x[i] = value(call, me, i);
    }

    void run() {
        std::mt19937 same(seed);             // every rank's: which calls are made
        for (int call = 0; call < calls; ++call) {
            const unsigned kind = same() % 6;
            const int64_t n = same() % 4 == 0 ? same() % 12000 : same() % 600, rows = same() % 20, width = 1 + same() % 90;
            if (own() % 16 == 0) std::this_thread::sleep_for(std::chrono::microseconds(own() % 300));
            if (kind == 0 && n) {
                float* x = tensor(n, 0);
                fill(x, call, n);
                done(call, "all_reduce", hetero_attn_cpu_all_reduce(group, x, n, F32, 0));
                for (int64_t i = 0; i < n; ++i) check(call, "all_reduce", i, x[i], sum(call, i));
            } else if (kind == 1 && rows) {
                float *x = tensor(rows * width, 0), *out = tensor(rows * width, 1);
                fill(x, call, rows * width);
                done(call, "reduce_scatter", hetero_attn_cpu_reduce_scatter(group, x, out, rows, width, F32, 0));
                for (int64_t i = 0; i < own_rows(rows) * width; ++i)
                    check(call, "reduce_scatter", i, out[i], sum(call, first_row(rows) * width + i));
                fill(x, call + 1, rows * width);             // x is the caller's again as soon as the call returns
            } else if (kind == 2) {
                std::vector<int64_t> parts(ranks);
                int64_t columns = 0, before = 0, outer = 1 + rows % 3;
                for (int r = 0; r < ranks; ++r) {
                    parts[r] = (int64_t)(same() % 300) * outer * 4;
                    if (r < me) before += parts[r] / outer / 4;
                    columns += parts[r] / outer / 4;
                }
                float *x = tensor(0, 0), *out = tensor(0, 1);
                fill(x, call, parts[me] / 4);
                done(call, "all_gather", hetero_attn_cpu_all_gather(group, x, out, parts.data(), outer, 0));
                for (int64_t o = 0; o < outer; ++o)
                    for (int64_t r = 0, column = 0; r < ranks; ++r)
                        for (int64_t i = 0, wide = parts[r] / outer / 4; i < wide; ++i, ++column)
                            check(call, "all_gather", o * columns + column, out[o * columns + column], value(call, (int)r, o * wide + i));
            } else if (kind == 3 && n) {
                const int src = (int)(same() % ranks);
                float* x = tensor(n, 0);
                fill(x, call, n);
                done(call, "broadcast", hetero_attn_cpu_broadcast(group, x, n * 4, src, 0));
                for (int64_t i = 0; i < n; ++i) check(call, "broadcast", i, x[i], value(call, src, i));
            } else if (kind == 4) {
                done(call, "barrier", hetero_attn_cpu_barrier(group, 0));
            } else if (rows) {
                norm(call, rows, width);
            }
        }
    }

    int64_t own_rows(int64_t rows) { return rows / ranks + (me < rows % ranks); }
    int64_t first_row(int64_t rows) { return rows / ranks * me + std::min<int64_t>(me, rows % ranks); }

    void norm(int call, int64_t rows, int64_t width) {
        float* x = tensor(rows * width, 0);
        float* out = own() % 2 ? x : tensor(rows * width, 1);
        std::vector<float> residual(own_rows(rows) * width, 1.0f), weight(width);
        for (int64_t i = 0; i < width; ++i) weight[i] = 0.5f + (float)(i % 3);
        fill(x, call, rows * width);
        done(call, "norm", hetero_attn_cpu_all_reduce_rms_norm(group, x, out, rows, width, F32, residual.data(), F32, weight.data(), F32,
                                                               nullptr, 0, 1e-5, 0.0, 0));
        for (int64_t row = 0; row < rows; ++row) {
            double squares = 0;
            for (int64_t i = 0; i < width; ++i) squares += std::pow(sum(call, row * width + i) + 1, 2);
            const double scale = 1 / std::sqrt(squares / (double)width + 1e-5);
            for (int64_t i = row * width; i < (row + 1) * width; ++i)
                check(call, "norm", i, out[i], (sum(call, i) + 1) * scale * weight[i % width], 1e-4);
        }
        for (int64_t i = 0; i < (int64_t)residual.size(); ++i)
            check(call, "residual", i, residual[i], sum(call, first_row(rows) * width + i) + 1);
    }
};

}  // namespace

int main(int argc, char** argv) {
    if (argc != 4) return 2;
    ranks = std::atoi(argv[1]);
    calls = std::atoi(argv[2]);
    seed = (unsigned)std::atoi(argv[3]);
    const int64_t reserved = hetero_attn_cpu_group_reserved(STAGE), bytes = reserved + HEAP;
    std::vector<uint64_t> bases;
    for (int r = 0; r < ranks; ++r) {
        void* memory = std::aligned_alloc(4096, bytes);
        std::memset(memory, 0, bytes);
        bases.push_back(reinterpret_cast<uint64_t>(memory));
    }
    std::vector<Rank> all;
    for (int r = 0; r < ranks; ++r) {
        HaGroup* group = hetero_attn_cpu_group_open(r, ranks, STAGE, ONE_SHOT, ranks > 2, nullptr);
        if (!group || hetero_attn_cpu_group_add(group, bases.data(), bytes)) return 3;
        all.push_back({r, group, std::mt19937(seed + 1000 + r), {}, reinterpret_cast<char*>(bases[r]) + reserved});
    }
    std::vector<std::thread> threads;
    for (Rank& each : all) threads.emplace_back([&each] { each.run(); });
    for (std::thread& each : threads) each.join();
    for (Rank& each : all) hetero_attn_cpu_group_close(each.group);
    for (uint64_t each : bases) std::free(reinterpret_cast<void*>(each));
    std::printf("ok %d\n", calls);
    return 0;
}
