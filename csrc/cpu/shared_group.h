// A group of ranks on one host: their control lines in shared memory, and how one waits for the others.
//
// Every exchange is a step: post(), then wait() until all ranks have posted it. Step numbers only grow, so nothing is ever reset. A
// rank posts step s + 1 after it is done with what the others wrote for step s; whoever sees step s + 1 posted by all may therefore
// overwrite what belonged to step s. Two control lines and two staging buffers, taken in turn, are all that this needs.
#pragma once
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "shared_memory.h"

namespace ha {

constexpr int MAX_RANKS = 64;                // the width of the mask of missing ranks
constexpr int MAX_SEGMENTS = 24;             // each added one at least doubles the heap
constexpr int64_t PAGE = 4096;
constexpr int64_t CACHE_LINE = 64;

enum Operation : int32_t { ALL_REDUCE = 1, REDUCE_SCATTER, ALL_GATHER, BROADCAST, BARRIER, ALL_REDUCE_RMS_NORM };

// Where a tensor lies in its rank's heap; segment -1: in private memory, so that a staging buffer stands in for it.
struct Place {
    int32_t segment;
    int64_t offset;
};

// What a rank says of its call. The first four agree on every rank, or the ranks are out of step.
struct Record {
    int32_t operation, dtype;
    int64_t count, parameter;
    int32_t x_segment, out_segment;          // the Places of what others read and of what they write
    int64_t x_offset, out_offset;
    int64_t wanted;                          // bytes of heap the rank would like to have
};

// One cache line, and the neighbour that the prefetcher fetches with it.
struct alignas(128) Slot {
    std::atomic<uint64_t> step;
    Record record;
};
static_assert(sizeof(Slot) == 128 && sizeof(Record) + sizeof(uint64_t) <= CACHE_LINE, "a slot is read in one cache miss");
static_assert(std::atomic<uint64_t>::is_always_lock_free, "the counter must work between processes");

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb" ::: "memory");        // yield is a no-op on most cores; isb takes about as long as x86's pause
#endif
}

inline int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * int64_t(1000000000) + t.tv_nsec;
}

// Waiting: with a core for every rank spin, since whoever is waited for is running. Ranks that outnumber the cores give theirs away
// soon. Either way a wait that lasts gives way now and then (another program may hold the core that the late rank needs), ends in
// naps, so that an idle rank burns no core, and asks the caller ten times a second whether to go on.
constexpr int SPINS_PER_LOOK = 16;
constexpr int64_t SPIN_ALONE_NS = 3'000, SPIN_CROWDED_NS = 500;
constexpr int64_t YIELD_ALONE_NS = 3'000'000, YIELD_CROWDED_NS = 1'000'000;
constexpr int64_t NAP_NS = 50'000, LONGEST_NAP_NS = 2'000'000, ASK_NS = 100'000'000;

}  // namespace ha

struct HaGroup {
    int rank, world_size, segments = 0, odd = -1;
    bool crowded;
    int64_t stage_bytes, one_shot_bytes;
    HaWaiting waiting;
    uint64_t step = 0;                       // the last one posted
    char* bases[ha::MAX_SEGMENTS][ha::MAX_RANKS];
    int64_t bytes[ha::MAX_SEGMENTS];
    float* scratch = nullptr;                // of the fused norm, grows
    int64_t scratch_floats = 0;

    static int64_t reserved(int64_t stage_bytes) { return ha::PAGE + 2 * stage_bytes; }

    ha::Slot& slot(int r, uint64_t s) const { return reinterpret_cast<ha::Slot*>(bases[0][r])[s & 1]; }
    const ha::Record& record(int r) const { return slot(r, step).record; }
    char* stage(int r, uint64_t s) const { return bases[0][r] + ha::PAGE + (s & 1) * stage_bytes; }

    ha::Place find(const void* x) const {
        for (int i = segments; i-- > 0;) {
            int64_t offset = static_cast<const char*>(x) - bases[i][rank];
            if (offset >= (i ? 0 : reserved(stage_bytes)) && offset < bytes[i]) return {i, offset};
        }
        return {-1, 0};
    }

    char* at(int r, ha::Place place) const { return place.segment < 0 ? nullptr : bases[place.segment][r] + place.offset; }

    void post(const ha::Record* said = nullptr) {
        ha::Slot& own = slot(rank, step + 1);
        if (said) own.record = *said;
        own.step.store(++step, std::memory_order_release);
    }

    bool wait() {
        for (int each = 1; each < world_size; ++each) {                  // the next rank first: not everybody polls the same line
            int r = rank + each < world_size ? rank + each : rank + each - world_size;
            const std::atomic<uint64_t>& posted = slot(r, step).step;
            for (int i = 0; posted.load(std::memory_order_acquire) < step; ++i) {
                if (i == ha::SPINS_PER_LOOK) {
                    if (!wait_long(posted)) return false;
                    break;
                }
                ha::relax();
            }
        }
        return true;
    }

    // Whether every rank makes the call that this one makes; the first step of each call asks.
    bool agree() {
        const ha::Record& own = record(rank);
        for (int r = 0; r < world_size; ++r) {
            const ha::Record& other = record(r);
            if (other.operation != own.operation || other.dtype != own.dtype || other.count != own.count || other.parameter != own.parameter) {
                odd = r;
                return false;
            }
        }
        return true;
    }

    int64_t most_wanted() const {
        int64_t most = 0;
        for (int r = 0; r < world_size; ++r) most = std::max(most, record(r).wanted);
        return most;
    }

private:
    bool wait_long(const std::atomic<uint64_t>& posted) {
        const int64_t began = ha::now_ns();
        const int64_t spin = crowded ? ha::SPIN_CROWDED_NS : ha::SPIN_ALONE_NS, yield = crowded ? ha::YIELD_CROWDED_NS : ha::YIELD_ALONE_NS;
        int64_t asked = 0, nap = ha::NAP_NS;
        while (posted.load(std::memory_order_acquire) < step) {
            const int64_t waited = ha::now_ns() - began;
            if (waited >= spin && waited < yield) sched_yield();
            if (waited >= yield) {
                timespec t = {0, nap};
                nanosleep(&t, nullptr);
                nap = std::min(nap + nap / 8, ha::LONGEST_NAP_NS);
            }
            if (waited - asked >= ha::ASK_NS) {
                asked = waited;
                if (waiting && waiting(missing())) return false;
            }
            for (int i = 0; i < ha::SPINS_PER_LOOK && posted.load(std::memory_order_relaxed) < step; ++i) ha::relax();
        }
        return true;
    }

    uint64_t missing() const {
        uint64_t mask = 0;
        for (int r = 0; r < world_size; ++r)
            if (slot(r, step).step.load(std::memory_order_relaxed) < step) mask |= uint64_t(1) << r;
        return mask;
    }
};
