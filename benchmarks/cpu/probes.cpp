// What the machine can do at most: read memory with T threads, and multiply-add in registers.
// Built by benchmarks/cpu/limits.py with -O3 -march=native for the machine that runs it; no framework, no OpenMP. Threads are made in
// each call, so a call should last milliseconds: small buffers are read `repeats` times.

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#else
constexpr int kVectorBytes = 32;
#endif
typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));
typedef float Floats __attribute__((vector_size(kVectorBytes)));

constexpr int kUnroll = 8;          // vectors a step: enough loads in flight to cover the cache's latency
constexpr int kChains = 12;         // independent multiply-adds: latency 4 x 2 units and some; 12 fit AVX2's 16 registers

static volatile uint64_t sink_words;
static volatile float sink_floats;

// Sums `words` vectors in `streams` parallel pieces, prefetching `ahead` bytes: hardware prefetchers follow several streams at once.
static void read_all(const Words* p, size_t vectors, int streams, size_t ahead) {
    Words sums[kUnroll] = {};
    const size_t piece = vectors / streams / kUnroll * kUnroll;
    for (size_t i = 0; i < piece; i += kUnroll) {
        for (int s = 0; s < streams; ++s) {
            const Words* q = p + s * piece + i;
            if (ahead)
                for (int b = 0; b < kUnroll * kVectorBytes; b += 64) __builtin_prefetch(reinterpret_cast<const char*>(q) + ahead + b);
            for (int u = 0; u < kUnroll; ++u) sums[u] += q[u];
        }
    }
    Words all = {};
    for (int u = 0; u < kUnroll; ++u) all += sums[u];
    sink_words = all[0] + all[1];
}

template <class Work>
static double timed(int threads, Work work) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
    work(0);
    for (auto& thread : others) thread.join();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Seconds to read `bytes` at `data` (64-byte aligned) `repeats` times, each thread its own part.
extern "C" double read_seconds(const void* data, size_t bytes, int threads, int repeats, int streams, size_t ahead) {
    const size_t each = bytes / kVectorBytes / threads;
    return timed(threads, [=](int t) {
        const Words* part = static_cast<const Words*>(data) + t * each;
        for (int r = 0; r < repeats; ++r) {
            read_all(part, each, streams, ahead);
            asm volatile("" ::: "memory");
        }
    });
}

// fp32 operations a second of `threads` threads that do nothing but fused multiply-adds on registers.
extern "C" double fma_flops(int threads, long steps) {
    const double seconds = timed(threads, [=](int) {
        Floats sums[kChains], factor, term;
        for (auto& sum : sums) sum = Floats{} + 1.0f;
        factor = Floats{} + 0.9999f, term = Floats{} + 0.0001f;
        asm volatile("" : "+m"(factor), "+m"(term));
        for (long i = 0; i < steps; ++i) {
            for (auto& sum : sums) sum = sum * factor + term;
        }
        Floats all = {};
        for (auto& sum : sums) all += sum;
        sink_floats = all[0];
    });
    return 2.0 * kChains * (kVectorBytes / 4) * steps * threads / seconds;
}
