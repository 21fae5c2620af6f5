// A fiber: a stack of its own and the switch between two of them. Every CUDA thread of a block is one, so that thousands of threads can
// wait for each other inside one thread of the system. A switch saves what the ABI lets a callee keep, about as much as a function call.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <sys/mman.h>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

constexpr size_t STACK_BYTES = 256 << 10;           // address space, not memory: pages come when touched

// Stacks for `count` fibers, the lowest page of each without access: running over a stack is a crash here, not another thread's numbers.
class Stacks {
 public:
  explicit Stacks(size_t count) : bytes_(count * STACK_BYTES) {
    void* base = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(base);
    for (size_t i = 0; i < count; i++) mprotect(bottom(i), 4096, PROT_NONE);
  }
  ~Stacks() {
    for (size_t i = 0; i < count(); i++) clear(i);
    munmap(base_, bytes_);
  }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  size_t count() const { return bytes_ / STACK_BYTES; }
  char* bottom(size_t i) const { return base_ + i * STACK_BYTES; }

  // The stack as new: what a fiber that never returned from its functions left marked is usable again.
  void clear(size_t i) const {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(bottom(i), STACK_BYTES);
#endif
    (void)i;
  }

 private:
  char* base_;
  size_t bytes_;
};

// Stacks that launches hand on to one another: fresh ones cost a page fault for every page that a thread touches.
class StackPool {
 public:
  std::unique_ptr<Stacks> take(size_t count) {
    std::lock_guard<std::mutex> held(lock_);
    for (auto& each : free_) {
      if (each->count() != count) continue;
      std::swap(each, free_.back());
      auto found = std::move(free_.back());
      free_.pop_back();
      return found;
    }
    return std::unique_ptr<Stacks>(new Stacks(count));
  }
  void give_back(std::unique_ptr<Stacks> stacks) {
    std::lock_guard<std::mutex> held(lock_);
    if (free_.size() < 8) free_.push_back(std::move(stacks));
  }

 private:
  std::mutex lock_;
  std::vector<std::unique_ptr<Stacks>> free_;
};

inline StackPool& stack_pool() {
  static StackPool pool;
  return pool;
}

struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t place;
#endif
  void* bottom = nullptr;                            // of its stack, for AddressSanitizer
  size_t size = 0;
  void* fake_stack = nullptr;
};

#if defined(__x86_64__)
extern "C" void simt_switch_stack(void** save, void* load);
asm(R"(
.text
.local simt_switch_stack
.type simt_switch_stack,@function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack,.-simt_switch_stack
)");

// Lay out a fresh stack so that the first switch to it "returns" into `entry`, aligned as after a call.
inline void prepare(Context& to, char* bottom, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(bottom + STACK_BYTES) & ~uintptr_t(15);
  auto* slot = reinterpret_cast<void**>(top) - 2;
  slot[1] = nullptr;
  slot[0] = reinterpret_cast<void*>(entry);
  to.stack_pointer = slot - 6;
  for (int i = 0; i < 6; i++) static_cast<void**>(to.stack_pointer)[i] = nullptr;
  to.bottom = bottom;
  to.size = STACK_BYTES;
}
#else
inline void prepare(Context& to, char* bottom, void (*entry)()) {
  getcontext(&to.place);
  to.place.uc_stack = {};
  to.place.uc_stack.ss_sp = bottom;
  to.place.uc_stack.ss_size = STACK_BYTES;
  to.place.uc_link = nullptr;
  makecontext(&to.place, entry, 0);
  to.bottom = bottom;
  to.size = STACK_BYTES;
}
#endif

// Leave `from` for `to`; returns when somebody switches back. `last`: `from` will never run again.
inline void switch_to(Context& from, Context& to, bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.bottom, to.size);
#endif
  (void)last;
#if defined(__x86_64__)
  simt_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.place, &to.place);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// The first thing a fresh fiber does. caller: who switched to it; AddressSanitizer learns that one's stack here.
inline void arrived(Context& caller) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  caller.bottom = const_cast<void*>(bottom);
  caller.size = size;
#endif
  (void)caller;
}

}  // namespace simt
