// What a program (a .cu compiled by csrc/simt/program.cpp) and the executor (runtime.cpp) say to each other.
//
// A thread meets others only in the functions below. `what`, `file` and `line` name the place in the source: lanes that meet at one warp
// operation, and threads that meet at one barrier, must come from the same place.
#pragma once
#include <cstddef>
#include <cstdint>

#define SIMT_API __attribute__((visibility("default")))

namespace simt {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

// Counters, in the order of hetero_attn/testing/simt.py's COUNTERS.
enum Counter : int {
  MMA, SHUFFLE, VOTE, SYNCWARP, BARRIER, SPECIAL, ATOMIC, SWITCHES,
  COUNTERS
};

// Runs on all lanes of `mask` at once; argument[lane] is what that lane passed, null for lanes that are not in the mask.
using WarpOperation = void (*)(void** argument, uint32_t mask);

enum Reduction : int { NONE, OR, AND, COUNT };

extern "C" {
SIMT_API Index simt_thread_index();                   // of the thread that runs; by value, so that no access is counted
SIMT_API Index simt_block_index();
SIMT_API Index simt_block_size();
SIMT_API Index simt_grid_size();
SIMT_API unsigned simt_lane();
SIMT_API void simt_warp(WarpOperation operation, Counter counter, uint32_t mask, const char* what, const char* file, int line,
                        void* argument);
SIMT_API int simt_barrier(Reduction reduction, int predicate, const char* what, const char* file, int line);
SIMT_API void simt_mma_m8n8k4(int b_row, float* sums, const uint32_t* a, const uint32_t* b, const char* file, int line);
SIMT_API void simt_yield(const char* what, const char* file, int line);          // spinning on what somebody else will write
SIMT_API void simt_count(Counter counter);
SIMT_API void simt_access(const void* place, const void* address, uint32_t size, int store);       // of an instrumented program
SIMT_API void simt_fail(const char* text, const char* file, int line);           // does not return
// Memory that several ranks touch, at system scope: relaxed data of up to 16 bytes, and flags. A load of a flag lets the others run.
SIMT_API void simt_system_load(void* into, const void* address, uint32_t size);
SIMT_API void simt_system_store(void* address, const void* bytes, uint32_t size);
SIMT_API uint64_t simt_flag_load(const uint64_t* flag, int acquire, const char* file, int line);
SIMT_API void simt_flag_store(uint64_t* flag, uint64_t value, int release);
SIMT_API uint64_t simt_nanoseconds();
}

// One kernel of a program: its body with the arguments as cuLaunchKernel takes them.
using Entry = void (*)(void** arguments);

// Where this thread's __shared__ variables lie: all of them, and within them the dynamic array.
struct SharedMemory {
  char* begin;
  size_t size;
  char* dynamic;
  size_t dynamic_capacity;
};
using FindShared = void (*)(SharedMemory* found);

struct Region {                                       // bytes of the dynamic shared memory that are counted apart
  uint32_t begin, end;
};

struct Options {                                      // hetero_attn/testing/simt.py's _Options
  uint32_t grid[3], block[3];
  uint64_t shared_bytes;
  int32_t workers;                                    // threads of the system; a block stays on one
  int32_t order;                                      // 0 ascending, 1 descending, 2 a step a warp in turn, 3 and more: shuffled by it
  int32_t resident;                                   // every block at once, each on a thread of its own: for blocks that wait for others
  int32_t counted;                                    // the program is instrumented: count and check its accesses
  double time_limit_s;
  const int32_t* cancelled;                           // set by whoever runs several launches: give up
  const Region* regions;
  int32_t region_count;
  int32_t agent;                                      // which rank's launch this is, 0 to AGENTS - 1, where memory is weak; -1: it is not
  int32_t stall_barrier;                              // each block sleeps behind its n-th barrier, 0 = behind none,
  double stall_s;                                     // and at its end, before its last stores are seen: so long
};

// Memory counters of one kind of access. Conflicts are wavefronts - ideal_wavefronts.
struct Traffic {
  uint64_t requests, bytes, wavefronts, ideal_wavefronts, sectors, ideal_sectors, lines;
};
constexpr int SPACES = 3, DIRECTIONS = 2, WIDTHS = 5;   // shared, global, other; load, store; 1 2 4 8 16 bytes

}  // namespace simt
