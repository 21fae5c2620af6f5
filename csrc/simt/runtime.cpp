// The executor: runs the blocks of a launch on threads of the system, each block's threads as fibers on one of them.
//
// It is an object of its own beside the programs it runs, because a program whose accesses are counted is instrumented by the compiler,
// and the counting must not be.
#include <atomic>
#include <cstdio>
#include <memory>
#include <mutex>
#include <thread>

#include "block.h"
#include "mma.h"

namespace simt {
namespace {

thread_local Block* current = nullptr;

void first_step() {
  arrived(current->scheduler);
  current->body();
  Block* block = current;
  Fiber* self = block->running;
  self->state = State::DONE;
  switch_to(self->context, block->scheduler, true);
  __builtin_trap();
}

void give_up(const std::string& text) {
  current->failure = text;
  current->suspend(State::DONE);
  __builtin_trap();
}

std::string name_of(const Index& at) {
  return "block (" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + "): ";
}

}  // namespace

extern "C" {

SIMT_API Index simt_thread_index() { return current->running->thread; }
SIMT_API Index simt_block_index() { return current->where; }
SIMT_API Index simt_block_size() { return {current->options.block[0], current->options.block[1], current->options.block[2]}; }
SIMT_API Index simt_grid_size() { return {current->options.grid[0], current->options.grid[1], current->options.grid[2]}; }
SIMT_API unsigned simt_lane() { return unsigned(current->running->index % 32); }

SIMT_API void simt_warp(WarpOperation operation, Counter counter, uint32_t mask, const char* what, const char* file, int line,
                        void* argument) {
  Fiber* self = current->running;
  self->operation = operation;
  self->counter = counter;
  self->mask = mask;
  self->argument = argument;
  self->place = {what, file, line};
  const unsigned lane = simt_lane();
  if (!(mask >> lane & 1)) give_up(self->place.words() + ": lane " + std::to_string(lane) + " is not in its own mask");
  current->suspend(State::AT_WARP);
}

SIMT_API int simt_barrier(Reduction reduction, int predicate, const char* what, const char* file, int line) {
  Fiber* self = current->running;
  self->reduction = reduction;
  self->predicate = predicate;
  self->place = {what, file, line};
  current->suspend(State::AT_BARRIER);
  return self->predicate;
}

SIMT_API void simt_mma_m8n8k4(int b_row, float* sums, const uint32_t* a, const uint32_t* b, const char* file, int line) {
  MmaArgument argument{sums, a, b};
  simt_warp(b_row ? mma_m8n8k4_warp<true> : mma_m8n8k4_warp<false>, MMA, 0xffffffffu, "mma.m8n8k4", file, line, &argument);
}

SIMT_API void simt_yield(const char* what, const char* file, int line) {
  current->running->place = {what, file, line};
  current->suspend(State::SPINNING);
}

SIMT_API void simt_count(Counter counter) { current->counters[counter]++; }

SIMT_API void simt_fail(const char* text, const char* file, int line) { give_up(Place{text, file, line}.words()); }

SIMT_API void simt_system_load(void* into, const void* address, uint32_t size) {
  if (auto* weak = current->weak.get()) weak->load(current->running->index, current->running->when.block, into, address, size);
  else memcpy(into, address, size);
}

SIMT_API void simt_system_store(void* address, const void* bytes, uint32_t size) {
  if (auto* weak = current->weak.get()) weak->store(current->running->index, current->running->when.block, address, bytes, size);
  else memcpy(address, bytes, size);
}

SIMT_API uint64_t simt_flag_load(const uint64_t* flag, int acquire, const char* file, int line) {
  simt_yield(acquire ? "an acquire load" : "a relaxed load", file, line);
  if (auto* weak = current->weak.get()) return weak->load_flag(current->running->index, flag, acquire);
  return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
}

SIMT_API void simt_flag_store(uint64_t* flag, uint64_t value, int release) {
  if (auto* weak = current->weak.get()) weak->store_flag(current->running->index, current->running->when.block, flag, value, release);
  else __atomic_store_n(flag, value, __ATOMIC_RELEASE);
}

SIMT_API uint64_t simt_nanoseconds() { return uint64_t(1e9 * seconds()); }

// A store by an earlier kernel of an agent (weak_memory.h); and what all launches so far have left behind is forgotten.
SIMT_API void simt_host_write(int agent, void* address, const void* bytes, uint64_t size) {
  std::lock_guard<std::mutex> held(weak_memory().lock);
  weak_memory().write(agent, uintptr_t(address), static_cast<const char*>(bytes), uint32_t(size));
}
SIMT_API void simt_forget() { weak_memory().forget(); }

SIMT_API void simt_access(const void* place, const void* address, uint32_t size, int store) {
  Block* block = current;
  if (!block || !block->ledger || !block->running) return;
  Fiber* self = block->running;
  const uintptr_t at = uintptr_t(address);
  if (at - uintptr_t(self->context.bottom) < STACK_BYTES) return;              // the thread's own: registers, or local memory
  const std::string wrong = block->ledger->note(self->index, {place, at, size, store != 0}, self->when);
  if (!wrong.empty()) give_up("thread " + std::to_string(self->index) + ": " + wrong);
}

// Run a launch. counters [COUNTERS]; traffic [SPACES][DIRECTIONS][WIDTHS]; regions [region_count][DIRECTIONS]: sums over all blocks.
// Returns 0, or 1 with a text in `error`: the first block that failed says why, and no further one is begun.
SIMT_API int simt_launch(Entry entry, FindShared find_shared, const Options* options, void** arguments, uint64_t* counters,
                         Traffic* traffic, Traffic* regions, char* error, size_t error_size) {
  const uint64_t blocks = uint64_t(options->grid[0]) * options->grid[1] * options->grid[2];
  const double deadline = seconds() + options->time_limit_s;
  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex lock;
  Books books;
  books.regions.resize(2 * options->region_count);
  auto work = [&] {
    SharedMemory shared{};
    find_shared(&shared);
    Index where;
    try {
      if (options->shared_bytes > shared.dynamic_capacity)
        throw Failure("the launch asks for " + std::to_string(options->shared_bytes) +
                      " bytes of dynamic shared memory, the executor has " + std::to_string(shared.dynamic_capacity));
      Block block(*options, entry, arguments, shared);
      Block* before = current;
      current = &block;
      try {
        for (uint64_t i; !failed && (i = next++) < blocks;) {
          where = {unsigned(i % options->grid[0]), unsigned(i / options->grid[0] % options->grid[1]),
                   unsigned(i / options->grid[0] / options->grid[1])};
          block.run(where, deadline, first_step);
        }
      } catch (...) {
        current = before;
        throw;
      }
      current = before;
      std::lock_guard<std::mutex> held(lock);
      for (int c = 0; c < COUNTERS; c++) counters[c] += block.counters[c];
      if (block.ledger) books.add(block.ledger->books);
    } catch (const std::exception& wrong) {
      std::lock_guard<std::mutex> held(lock);
      if (!failed.exchange(true)) snprintf(error, error_size, "%s%s", name_of(where).c_str(), wrong.what());
    }
  };
  const uint64_t wanted = options->resident ? blocks : std::min<uint64_t>(blocks, uint64_t(std::max(options->workers, 1)));
  std::vector<std::thread> others;
  try {
    for (uint64_t i = 1; i < wanted; i++) others.emplace_back(work);
  } catch (const std::exception& wrong) {
    failed = true;
    snprintf(error, error_size, "%s", wrong.what());
  }
  if (blocks && !failed) work();
  for (auto& each : others) each.join();
  if (traffic) memcpy(traffic, books.traffic, sizeof books.traffic);
  if (regions && !books.regions.empty()) memcpy(regions, books.regions.data(), books.regions.size() * sizeof(Traffic));
  return failed;
}

}  // extern "C"
}  // namespace simt
