// A program that runs the kernels elsewhere than in the caller's process: calls come on standard input, results go to standard output.
// So the tests hold kernels for another processor (under an emulator) and sanitized ones to the same cases as everything else. Every tensor
// gets memory of its own of exactly the bytes that the call may touch, so a sanitizer sees one byte more.
//
//   request   kind (0 attention, 1 linear), regions, the struct; per region: offset of its pointer in the struct, bytes, misalignment
//             against 64 bytes, whether it is written; then its bytes.       all numbers int64 in this machine's order
//   answer    the status; then the bytes of the written regions in order.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "abi.h"

#if defined(_OPENMP)
extern "C" void GOMP_parallel(void (*fn)(void*), void* data, unsigned threads, unsigned flags);
constexpr HaParallel PARALLEL = GOMP_parallel;
#else
constexpr HaParallel PARALLEL = nullptr;
#endif

namespace {

struct Region { int64_t offset, bytes, misalignment, written; };

bool receive(void* to, size_t bytes) { return bytes == 0 || std::fread(to, 1, bytes, stdin) == bytes; }
void send(const void* from, size_t bytes) { std::fwrite(from, 1, bytes, stdout); }

// One call. False at the end of the input.
template <class Struct, class Function>
bool serve(int64_t regions, Function function) {
    Struct call;
    if (!receive(&call, sizeof call)) return false;
    std::vector<Region> described(regions);
    std::vector<char*> memory(regions);
    for (int64_t i = 0; i < regions; ++i) {
        Region& region = described[i];
        if (!receive(&region, sizeof region)) return false;
        void* start = nullptr;
        if (posix_memalign(&start, 64, region.misalignment + region.bytes + (region.bytes == 0))) return false;
        memory[i] = static_cast<char*>(start);
        char* data = memory[i] + region.misalignment;
        if (!receive(data, region.bytes)) return false;
        std::memcpy(reinterpret_cast<char*>(&call) + region.offset, &data, sizeof data);
    }
    call.parallel = PARALLEL;
    int64_t status = function(&call);
    send(&status, sizeof status);
    for (int64_t i = 0; i < regions; ++i) {
        if (described[i].written) send(memory[i] + described[i].misalignment, described[i].bytes);
        std::free(memory[i]);
    }
    std::fflush(stdout);
    return true;
}

}  // namespace

int main() {
    int64_t head[2];                         // kind, regions
    while (receive(head, sizeof head)) {
        bool served = head[0] == 0 ? serve<HaAttention>(head[1], hetero_attn_cpu_attention) : serve<HaLinear>(head[1], hetero_attn_cpu_linear);
        if (!served) return 1;
    }
    return 0;
}
