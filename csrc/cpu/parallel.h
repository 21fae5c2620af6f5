// Work items over the caller's threads. Items are taken from one counter, so threads never wait for the slowest share; results do not
// depend on who takes what, which is why the bits are the same for any number of threads. Beside communication every thread offers the
// processor between items (hetero_attn/in_flight.py says why): a yield costs a fraction of a microsecond where nobody waits.
#pragma once
#include <atomic>
#include <cstdlib>
#include <thread>

#include "abi.h"

namespace ha {

// Memory that outlives a call, one per thread and per use: grows, is freed with the thread. 64-byte aligned; contents are not kept.
class Scratch {
public:
    ~Scratch() { std::free(memory_); }
    // At least `floats` floats, or null when there is no memory.
    float* take(size_t floats) {
        if (floats > size_) {
            std::free(memory_);
            size_t bytes = (floats * sizeof(float) + 4095) / 4096 * 4096;
            memory_ = static_cast<float*>(std::aligned_alloc(64, bytes));
            size_ = memory_ ? bytes / sizeof(float) : 0;
        }
        return memory_;
    }

private:
    float* memory_ = nullptr;
    size_t size_ = 0;
};

inline std::atomic<int32_t> share_processor{0};

inline void between_items() {
    if (share_processor.load(std::memory_order_relaxed)) std::this_thread::yield();
}

// work(item) for every item in [0, items), on up to `threads` threads.
template <class Work>
void parallel_for(HaParallel parallel, int threads, int64_t items, const Work& work) {
    if (threads > items) threads = (int)items;
    if (!parallel || threads <= 1) {
        for (int64_t i = 0; i < items; ++i) {
            work(i);
            between_items();
        }
        return;
    }
    struct Shared {
        std::atomic<int64_t> next;
        int64_t items;
        const Work* work;
    } shared{{0}, items, &work};
    parallel(
        [](void* data) {
            Shared& s = *static_cast<Shared*>(data);
            for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.items;) {
                (*s.work)(i);
                between_items();
            }
        },
        &shared, (unsigned)threads, 0);
}

}  // namespace ha
