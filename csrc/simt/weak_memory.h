// Memory as several devices see it: a store is seen by others once it has been released to them, and not before.
//
// Accesses at system scope (simt_system_load, simt_system_store, simt_flag_...) come here when a launch asks for it. The adversary takes
// every freedom that the memory model leaves, and always the same one: a relaxed store waits in its block's buffer until that thread, or
// one that a barrier of the block puts after it, releases (or the kernel ends); a relaxed load gives the oldest value that nothing has yet
// ordered before it. Flags are seen at once, whatever their order: that lets data be late behind them.
//   agent   the launches of one rank; they follow one another, and each begins with what the last one knew
//   view    of a thread: for each agent the time up to which its stores are ordered before the thread. A barrier of the block joins views,
//           an acquire takes over the view that was released with the flag's value
// A release publishes everything that its agent has let go of so far, other blocks' stores too (one clock an agent): a missing order between
// two blocks of one rank does not show here. The kernels have none: a CTA meets its own like, and its rows are its own.
// What no agent stores here (a residual, memory written by torch) is plain memory, seen at once. host_write() is a store by an agent's
// earlier kernel: what a summand is to the collective that follows.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace simt {

constexpr int AGENTS = 64;
using View = std::array<uint64_t, AGENTS>;

inline void join(View& to, const View& from) {
  for (int agent = 0; agent < AGENTS; agent++) to[agent] = std::max(to[agent], from[agent]);
}

struct Held {                                         // a store that waits in a block's buffer
  uintptr_t address;
  uint32_t size;
  char bytes[16];
  size_t thread;
  uint32_t epoch;                                     // of the block's barriers
};

class WeakMemory {
 public:
  std::mutex lock;

  View begin(int agent) {
    std::lock_guard<std::mutex> held(lock);
    View view = known_[agent];
    view[agent] = now_;
    return view;
  }
  void end(int agent, const View& view) {
    std::lock_guard<std::mutex> held(lock);
    join(known_[agent], view);
  }
  void forget() {
    std::lock_guard<std::mutex> held(lock);
    history_.clear();
    released_.clear();
    known_.clear();
  }

  // All of this with the lock held.
  void write(int agent, uintptr_t address, const char* bytes, uint32_t size) {
    for (uintptr_t at = address; at < address + size; at++) {
      char* memory = reinterpret_cast<char*>(at);
      history_[at].push_back({++now_, agent, *memory});
      *memory = bytes[at - address];
    }
  }
  uint64_t now() const { return now_; }
  void read(const View& view, uintptr_t address, char* bytes, uint32_t size) {
    for (uintptr_t at = address; at < address + size; at++) {
      char value = *reinterpret_cast<const char*>(at);
      auto found = history_.find(at);
      if (found != history_.end())
        for (auto& before : found->second)
          if (before.time > view[before.agent]) {     // the first store that nothing orders before the load: what it overwrote
            value = before.old;
            break;
          }
      bytes[at - address] = value;
    }
  }
  void release(uintptr_t flag, uint64_t value, const View& view) { released_[flag] = {value, view}; }
  void relax(uintptr_t flag) { released_.erase(flag); }
  void acquire(uintptr_t flag, uint64_t value, View& view) const {
    auto found = released_.find(flag);
    if (found != released_.end() && found->second.value == value) join(view, found->second.view);
  }

 private:
  struct Before {
    uint64_t time;
    int agent;
    char old;
  };
  struct Released {
    uint64_t value;
    View view;
  };
  uint64_t now_ = 1;
  std::unordered_map<uintptr_t, std::vector<Before>> history_;
  std::unordered_map<uintptr_t, Released> released_;
  std::map<int, View> known_;
};

inline WeakMemory& weak_memory() {
  static WeakMemory memory;
  return memory;
}

// A block's side of it: its buffer of stores, and its threads' views.
class WeakBlock {
 public:
  WeakBlock(int agent, size_t threads) : agent_(agent), views_(threads) {}

  void begin() { std::fill(views_.begin(), views_.end(), weak_memory().begin(agent_)); }

  void barrier() {
    View all = views_[0];
    for (auto& view : views_) join(all, view);
    std::fill(views_.begin(), views_.end(), all);
  }

  void store(size_t thread, uint32_t epoch, const void* address, const void* bytes, uint32_t size) {
    Held each{uintptr_t(address), size, {}, thread, epoch};
    memcpy(each.bytes, bytes, size);
    buffer_.push_back(each);
  }

  void load(size_t thread, uint32_t epoch, void* into, const void* address, uint32_t size) {
    auto& memory = weak_memory();
    std::lock_guard<std::mutex> held(memory.lock);
    memory.read(views_[thread], uintptr_t(address), static_cast<char*>(into), size);
    for (auto& each : buffer_)                         // one's own stores, and those before the block's last barrier
      if (each.address == uintptr_t(address) && each.size == size && (each.thread == thread || each.epoch < epoch))
        memcpy(into, each.bytes, size);
  }

  void store_flag(size_t thread, uint32_t epoch, uint64_t* flag, uint64_t value, bool release) {
    auto& memory = weak_memory();
    std::lock_guard<std::mutex> held(memory.lock);
    if (release) {
      flush(thread, epoch);
      View view = views_[thread];
      view[agent_] = memory.now();
      memory.release(uintptr_t(flag), value, view);
    } else {
      memory.relax(uintptr_t(flag));
    }
    __atomic_store_n(flag, value, __ATOMIC_RELEASE);
  }

  uint64_t load_flag(size_t thread, const uint64_t* flag, bool acquire) {
    auto& memory = weak_memory();
    std::lock_guard<std::mutex> held(memory.lock);
    const uint64_t value = __atomic_load_n(flag, __ATOMIC_ACQUIRE);
    if (acquire) memory.acquire(uintptr_t(flag), value, views_[thread]);
    return value;
  }

  void end() {                                         // the kernel's end: all is seen by what follows it on this agent
    {
      std::lock_guard<std::mutex> held(weak_memory().lock);
      flush(0, ~0u);
    }
    barrier();
    weak_memory().end(agent_, views_[0]);
  }

 private:
  void flush(size_t thread, uint32_t epoch) {
    auto& memory = weak_memory();
    std::vector<Held> kept;
    for (auto& each : buffer_)
      if (each.thread == thread || each.epoch < epoch) memory.write(agent_, each.address, each.bytes, each.size);
      else kept.push_back(each);
    buffer_.swap(kept);
  }

  const int agent_;
  std::vector<View> views_;
  std::vector<Held> buffer_;
};

}  // namespace simt
