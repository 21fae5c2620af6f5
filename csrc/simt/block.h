// One block: its threads as fibers, and the scheduler that runs them and lets them meet.
//
// A fiber runs until it reaches a warp operation, a barrier, or its end. Lanes whose mask names one another must all come to the same
// operation at the same place; threads of a block must all come to the same barrier. What the hardware leaves undefined (a lane that never
// comes, exited threads, two places at once) is an error here that names both places. Lanes are run in several orders, because a kernel
// that forgets to synchronise is right in one of them by luck.
#pragma once
#include <chrono>
#include <memory>
#include <random>
#include <sched.h>
#include <stdexcept>
#include <thread>
#include <time.h>

#include "fiber.h"
#include "ledger.h"
#include "runtime.h"
#include "weak_memory.h"

namespace simt {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class State : uint8_t { RUNNABLE, AT_WARP, AT_BARRIER, SPINNING, DONE };

struct Place {
  const char* what = "";
  const char* file = "";
  int line = 0;
  bool operator==(const Place& other) const { return line == other.line && !strcmp(what, other.what) && !strcmp(file, other.file); }
  std::string words() const {
    const char* base = strrchr(file, '/');
    return std::string(what) + " at " + (base ? base + 1 : file) + ":" + std::to_string(line);
  }
};

struct Fiber {
  Context context;
  State state = State::RUNNABLE;
  Place place;
  WarpOperation operation = nullptr;
  Counter counter = SYNCWARP;
  uint32_t mask = 0;
  void* argument = nullptr;
  Reduction reduction = NONE;
  int predicate = 0;
  Ledger::When when{0, 0};
  size_t index = 0;                                    // in the block, x fastest
  Index thread;
};

inline double seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

class Block {
 public:
  Block(const Options& options, Entry entry, void** arguments, const SharedMemory& shared)
      : options(options), entry_(entry), arguments_(arguments), shared_(shared),
        count_(size_t(options.block[0]) * options.block[1] * options.block[2]), fibers_(count_), stacks_(stack_pool().take(count_)),
        random_(unsigned(options.order)) {
    if (options.counted) ledger.reset(new Ledger(count_, shared, options));
    if (options.agent >= 0) weak.reset(new WeakBlock(options.agent, count_));
  }

  ~Block() { stack_pool().give_back(std::move(stacks_)); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  const Options& options;
  uint64_t counters[COUNTERS] = {};
  std::unique_ptr<Ledger> ledger;
  std::unique_ptr<WeakBlock> weak;
  Fiber* running = nullptr;
  Index where;
  Context scheduler;
  std::string failure;                                 // what a fiber reported before it gave up

  void run(Index at, double deadline, void (*first_step)()) {
    deadline_ = deadline;
    barriers_ = 0;
    where = at;
    if (ledger) ledger->new_block();
    epoch_++;
    memset(shared_.begin, 0xff, shared_.size);         // NaN in every format: what nobody wrote shows
    for (size_t i = 0; i < count_; i++) {
      Fiber& f = fibers_[i];
      f = Fiber();
      f.index = i;
      f.when.block = epoch_;
      f.thread = {unsigned(i % options.block[0]), unsigned(i / options.block[0] % options.block[1]),
                  unsigned(i / options.block[0] / options.block[1])};
      stacks_->clear(i);
      prepare(f.context, stacks_->bottom(i), first_step);
    }
    if (weak) weak->begin();
    schedule();
    if (options.stall_s > 0) stall();
    if (weak) weak->end();
    check_tail();
  }

  void body() { entry_(arguments_); }

  void suspend(State state) {
    running->state = state;
    Fiber* self = running;
    switch_to(self->context, scheduler);
  }

 private:
  // The bytes that the launch did not ask for are as poisoned as they were.
  void check_tail() const {
    const size_t granted = options.shared_bytes, rest = shared_.dynamic_capacity - granted;
    const char* tail = shared_.dynamic + granted;
    if (rest < 2 || (tail[0] == '\xff' && !memcmp(tail, tail + 1, rest - 1))) return;
    for (size_t at = 0; at < rest; at++)
      if (tail[at] != '\xff')
        throw Failure("byte " + std::to_string(granted + at) + " of the dynamic shared memory was written, of which the launch asked for " +
                      std::to_string(granted));
  }

  size_t warps() const { return (count_ + 31) / 32; }
  size_t lanes(size_t warp) const { return std::min<size_t>(32, count_ - 32 * warp); }

  std::vector<size_t> order_of(size_t n) {
    std::vector<size_t> order(n);
    for (size_t i = 0; i < n; i++) order[i] = options.order == 1 ? n - 1 - i : i;
    if (options.order >= 3) std::shuffle(order.begin(), order.end(), random_);
    return order;
  }

  void schedule() {
    for (int idle = 0;;) {
      bool moved = false;
      for (size_t warp : order_of(warps())) {
        bool again = true;
        while (again) {                                // in turns (2, 3, ...): one step, then the next warp
          again = step(warp);
          moved |= again;
          if (options.order >= 2) break;
        }
      }
      moved |= pass_barrier();
      size_t done = 0, spinning = 0;
      for (auto& f : fibers_) {
        done += f.state == State::DONE;
        spinning += f.state == State::SPINNING;
      }
      if (done == count_) return;
      if (spinning) {                                  // what they wait for may come from another block or rank
        check_time();
        idle = moved ? 0 : idle + 1;
        if (idle > 20) std::this_thread::sleep_for(std::chrono::microseconds(20));
        else if (idle) sched_yield();
        for (auto& f : fibers_)
          if (f.state == State::SPINNING) f.state = State::RUNNABLE;
      } else if (!moved) {
        throw Failure(deadlock());
      }
    }
  }

  // Run each runnable lane of the warp to where it waits, then whatever operations are complete. Whether anything happened.
  bool step(size_t warp) {
    const size_t first = 32 * warp, n = lanes(warp);
    bool moved = false;
    for (size_t lane : order_of(n)) {
      Fiber& f = fibers_[first + lane];
      if (f.state != State::RUNNABLE) continue;
      running = &f;
      counters[SWITCHES]++;
      switch_to(scheduler, f.context);
      running = nullptr;
      moved |= f.state != State::SPINNING;             // one that looks in vain lets other threads of the system have the core
      if (!failure.empty()) throw Failure(std::move(failure));
    }
    if (ledger) settle_if_met(first, n);
    while (meet(first, n)) moved = true;
    return moved;
  }

  void settle_if_met(size_t first, size_t n) {
    for (size_t l = 0; l < n; l++)
      if (fibers_[first + l].state == State::RUNNABLE) return;
    ledger->settle(first, n);
  }

  // One warp operation of the warp, if all lanes that it names are there.
  bool meet(size_t first, size_t n) {
    for (size_t l = 0; l < n; l++) {
      Fiber& f = fibers_[first + l];
      if (f.state != State::AT_WARP) continue;
      void* arguments[32] = {};
      bool complete = true;
      for (size_t j = 0; j < 32 && complete; j++) {
        if (!(f.mask >> j & 1)) continue;
        if (j >= n) throw Failure(f.place.words() + ": the mask names lane " + std::to_string(j) + ", the warp has " + std::to_string(n));
        Fiber& other = fibers_[first + j];
        if (other.state == State::DONE)
          throw Failure(describe(f) + " waits for " + describe(other) + ", which has exited");
        if (other.state == State::AT_BARRIER) throw Failure(diverged("at a warp operation", f, other));
        complete = other.state == State::AT_WARP;
        if (complete && (!(other.place == f.place) || other.operation != f.operation || other.mask != f.mask))
          throw Failure(diverged("at a warp operation", f, other));
        arguments[j] = other.argument;
      }
      if (!complete) continue;
      if (f.operation) f.operation(arguments, f.mask);
      counters[f.counter]++;
      for (size_t j = 0; j < n; j++) {
        if (!(f.mask >> j & 1)) continue;
        Fiber& lane = fibers_[first + j];
        lane.state = State::RUNNABLE;
        if (f.counter == SYNCWARP) lane.when.warp++;
      }
      return true;
    }
    return false;
  }

  bool pass_barrier() {
    Fiber* waiting = nullptr;
    for (auto& f : fibers_)
      if (f.state == State::AT_BARRIER) waiting = &f;
    if (!waiting) return false;
    int any = 0, all = 1, count = 0;
    for (auto& f : fibers_) {
      if (f.state == State::DONE) throw Failure(describe(*waiting) + " waits for " + describe(f) + ", which has exited");
      if (f.state != State::AT_BARRIER) return false;
      if (!(f.place == waiting->place)) throw Failure(diverged("at a barrier", f, *waiting));
      any |= f.predicate != 0;
      all &= f.predicate != 0;
      count += f.predicate != 0;
    }
    epoch_++;
    if (weak) weak->barrier();
    for (auto& f : fibers_) {
      f.state = State::RUNNABLE;
      f.predicate = f.reduction == OR ? any : f.reduction == AND ? all : count;
      f.when.block = epoch_;
    }
    counters[BARRIER]++;
    if (++barriers_ == options.stall_barrier) stall();
    return true;
  }

  void stall() const { std::this_thread::sleep_for(std::chrono::duration<double>(options.stall_s)); }

  static std::string describe(const Fiber& f) {
    std::string at = f.state == State::DONE ? "" : " (" + f.place.words() + ")";
    return "thread " + std::to_string(f.index) + at;
  }

  static std::string diverged(const char* where, const Fiber& a, const Fiber& b) {
    return std::string("threads diverge ") + where + ": " + describe(a) + (a.mask != b.mask ? " mask " + std::to_string(a.mask) : "") +
           ", " + describe(b) + (a.mask != b.mask ? " mask " + std::to_string(b.mask) : "");
  }

  std::string deadlock() const {
    std::string text = "deadlock:";
    int shown = 0;
    for (auto& f : fibers_)
      if (f.state != State::DONE && shown++ < 6) text += " " + describe(f);
    return text;
  }

  void check_time() {
    if (options.cancelled && __atomic_load_n(options.cancelled, __ATOMIC_RELAXED)) throw Failure("given up: another launch failed");
    if (seconds() < deadline_) return;
    for (auto& f : fibers_)
      if (f.state == State::SPINNING)
        throw Failure(describe(f) + " has waited " + std::to_string(int(options.time_limit_s)) + " s for what nobody wrote");
  }

  Entry entry_;
  void** arguments_;
  SharedMemory shared_;
  size_t count_;
  std::vector<Fiber> fibers_;
  std::unique_ptr<Stacks> stacks_;
  std::mt19937 random_;
  double deadline_ = 0;
  int32_t barriers_ = 0;                               // that this run has passed
  uint32_t epoch_ = 0;                                 // grows with every barrier and every block: what was before it is ordered
};

}  // namespace simt
