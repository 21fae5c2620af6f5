// What a block's accesses cost and whether they race: the books behind the counters of an instrumented program.
//
// The hardware executes a load or store for a whole warp at once. Here each lane runs alone up to the next point where the warp meets, so
// lanes write down (place, address, size) and the warp's lists are then laid side by side: the n-th access from one place in the code, of
// all lanes, is one request. Shared memory (Volta and later): 32 banks of 4 bytes; a request of up to 4 bytes a lane is served in one
// phase, 8 bytes in two phases of 16 lanes, 16 bytes in four of 8. In a phase each bank gives one word to all who ask for it; the phase
// takes as many wavefronts as the busiest bank has different words. Global memory: sectors of 32 bytes, lines of 128.
// Races: two threads touch the same byte of shared memory, one of them writes, and no barrier of the block (or __syncwarp, within a
// warp) lies between. The order in which the fibers happened to run plays no part.
#pragma once
#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "runtime.h"

namespace simt {

constexpr int BANKS = 32, WORD = 4, SECTOR = 32, LINE = 128;

struct Access {
  const void* place;
  uintptr_t address;
  uint32_t size;
  bool store;
};

struct Books {                                        // summed over blocks and workers
  Traffic traffic[SPACES][DIRECTIONS][WIDTHS] = {};
  std::vector<Traffic> regions;                       // [region][direction]

  void add(const Books& other) {
    auto sum = [](Traffic& to, const Traffic& from) {
      auto* a = reinterpret_cast<uint64_t*>(&to);
      auto* b = reinterpret_cast<const uint64_t*>(&from);
      for (size_t i = 0; i < sizeof(Traffic) / 8; i++) a[i] += b[i];
    };
    for (int s = 0; s < SPACES; s++)
      for (int d = 0; d < DIRECTIONS; d++)
        for (int w = 0; w < WIDTHS; w++) sum(traffic[s][d][w], other.traffic[s][d][w]);
    for (size_t i = 0; i < regions.size(); i++) sum(regions[i], other.regions[i]);
  }
};

class Ledger {
 public:
  // A thread's epoch: changes with every barrier of its block, and of its warp.
  struct When {
    uint32_t block, warp;
  };

  Ledger(size_t threads, const SharedMemory& shared, const Options& options)
      : shared_(shared), options_(options), lists_(threads), cells_(shared.size) {
    books.regions.resize(2 * options.region_count);
  }

  Books books;

  void new_block() {
    for (auto& each : lists_) each.clear();
  }

  // Note an access of thread `index`; "" or what is wrong with it.
  std::string note(size_t index, const Access& access, When now) {
    if (access.size <= 16 && access.address % access.size)
      return "address is not a multiple of the access's " + std::to_string(access.size) + " bytes";
    lists_[index].push_back(access);
    const uintptr_t offset = access.address - uintptr_t(shared_.begin);
    if (offset >= shared_.size) return "";
    const uintptr_t dynamic = access.address - uintptr_t(shared_.dynamic);
    if (dynamic < shared_.dynamic_capacity && dynamic + access.size > options_.shared_bytes)
      return "byte " + std::to_string(dynamic + access.size - 1) + " of the dynamic shared memory, of which the launch asked for " +
             std::to_string(options_.shared_bytes);
    for (uintptr_t at = offset; at < std::min(offset + access.size, shared_.size); at++) {
      const int32_t other = race(cells_[at], int32_t(index), access.store, now);
      if (other >= 0)
        return std::string(access.store ? "write" : "read") + " of shared memory at byte " + std::to_string(at) + " races with thread " +
               std::to_string(other) + ": no " + (other / 32 == int32_t(index) / 32 ? "__syncwarp" : "__syncthreads") + " between them";
    }
    return "";
  }

  // The lanes of one warp have met: settle what they did since they last met. first: the warp's first thread.
  void settle(size_t first, size_t count) {
    size_t longest = 0;
    bool alike = true;
    for (size_t l = 0; l < count; l++) {
      longest = std::max(longest, lists_[first + l].size());
      alike = alike && lists_[first + l].size() == lists_[first].size();
    }
    if (!longest) return;
    for (size_t i = 0; alike && i < longest; i++)
      for (size_t l = 1; l < count; l++) alike = alike && lists_[first + l][i].place == lists_[first][i].place;
    std::vector<const Access*> request;
    if (alike) {
      for (size_t i = 0; i < longest; i++) {
        request.clear();
        for (size_t l = 0; l < count; l++) request.push_back(&lists_[first + l][i]);
        serve(request);
      }
    } else {
      std::map<std::pair<const void*, size_t>, std::vector<const Access*>> requests;      // (place, n-th time) -> one access a lane
      for (size_t l = 0; l < count; l++) {
        std::unordered_map<const void*, size_t> times;
        for (auto& each : lists_[first + l]) {
          auto& lanes = requests[{each.place, times[each.place]++}];
          lanes.resize(count, nullptr);
          lanes[l] = &each;
        }
      }
      for (auto& [key, lanes] : requests) serve(lanes);
    }
    for (size_t l = 0; l < count; l++) lists_[first + l].clear();
  }

 private:
  struct Touch {
    int32_t thread = -1;
    When when{0, 0};
  };
  struct Cell {
    Touch write, read, other_read;                    // other_read: by another warp than `read`
  };

  static bool unordered(const Touch& then, int32_t thread, When now) {
    if (then.thread < 0 || then.thread == thread || then.when.block != now.block) return false;
    return then.thread / 32 != thread / 32 || then.when.warp == now.warp;
  }

  // The thread that a touch of the cell races with, or -1; the touch is noted.
  static int32_t race(Cell& cell, int32_t thread, bool store, When now) {
    int32_t other = -1;
    if (unordered(cell.write, thread, now)) other = cell.write.thread;
    if (store) {
      for (const Touch* read : {&cell.read, &cell.other_read})
        if (unordered(*read, thread, now)) other = read->thread;
      cell.write = {thread, now};
      return other;
    }
    if (cell.read.thread >= 0 && cell.read.when.block == now.block && cell.read.thread / 32 != thread / 32) cell.other_read = cell.read;
    cell.read = {thread, now};
    return other;
  }

  static int width_of(uint32_t size) { return size >= 16 ? 4 : size >= 8 ? 3 : size >= 4 ? 2 : size >= 2 ? 1 : 0; }

  // One request: lanes[l] is lane l's access, or null.
  void serve(const std::vector<const Access*>& lanes) {
    const Access* any = nullptr;
    for (auto* each : lanes)
      if (each) any = each;
    if (!any) return;
    const uintptr_t offset = any->address - uintptr_t(shared_.begin);
    const int space = offset < shared_.size ? 0 : 1;
    Traffic cost{};
    cost.requests = 1;
    for (auto* each : lanes) cost.bytes += each ? each->size : 0;
    space == 0 ? shared_cost(lanes, any->size, cost) : global_cost(lanes, cost);
    add(books.traffic[space][any->store][width_of(any->size)], cost);
    if (space) return;
    const uintptr_t dynamic = any->address - uintptr_t(shared_.dynamic);
    for (int r = 0; r < options_.region_count; r++)
      if (dynamic >= options_.regions[r].begin && dynamic < options_.regions[r].end) add(books.regions[2 * r + any->store], cost);
  }

  static void add(Traffic& to, const Traffic& cost) {
    auto* a = reinterpret_cast<uint64_t*>(&to);
    auto* b = reinterpret_cast<const uint64_t*>(&cost);
    for (size_t i = 0; i < sizeof(Traffic) / 8; i++) a[i] += b[i];
  }

  static void shared_cost(const std::vector<const Access*>& lanes, uint32_t size, Traffic& cost) {
    const size_t phase_lanes = size >= 16 ? 8 : size >= 8 ? 16 : 32;
    for (size_t start = 0; start < lanes.size(); start += phase_lanes) {
      std::vector<uintptr_t> words[BANKS];
      bool used = false;
      for (size_t l = start; l < std::min(start + phase_lanes, lanes.size()); l++) {
        if (!lanes[l]) continue;
        used = true;
        for (uintptr_t word = lanes[l]->address / WORD; word * WORD < lanes[l]->address + lanes[l]->size; word++) {
          auto& bank = words[word % BANKS];
          if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
        }
      }
      if (!used) continue;
      size_t busiest = 1;
      for (auto& bank : words) busiest = std::max(busiest, bank.size());
      cost.wavefronts += busiest;
      cost.ideal_wavefronts++;
    }
  }

  static void global_cost(const std::vector<const Access*>& lanes, Traffic& cost) {
    std::vector<uintptr_t> sectors, lines, bytes;
    for (auto* each : lanes) {
      if (!each) continue;
      for (uintptr_t at = each->address; at < each->address + each->size; at++) bytes.push_back(at);
      for (uintptr_t at = each->address / SECTOR; at * SECTOR < each->address + each->size; at++) sectors.push_back(at);
      for (uintptr_t at = each->address / LINE; at * LINE < each->address + each->size; at++) lines.push_back(at);
    }
    auto different = [](std::vector<uintptr_t>& of) {
      std::sort(of.begin(), of.end());
      return uint64_t(std::unique(of.begin(), of.end()) - of.begin());
    };
    cost.sectors = different(sectors);
    cost.lines = different(lines);
    cost.ideal_sectors = (different(bytes) + SECTOR - 1) / SECTOR;
  }

  const SharedMemory shared_;
  const Options& options_;
  std::vector<std::vector<Access>> lists_;            // by thread
  std::vector<Cell> cells_;                           // by byte of shared memory
};

}  // namespace simt
