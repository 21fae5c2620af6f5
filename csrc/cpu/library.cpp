// What this object says of itself: its instruction set and the layout of its structs, which the loader compares before the first call.
#include "abi.h"
#include "parallel.h"
#include "vec.h"

extern "C" const char* hetero_attn_cpu_instruction_set(void) { return ha::instruction_set(); }

extern "C" void hetero_attn_cpu_share_processor(int32_t share) { ha::share_processor.store(share, std::memory_order_relaxed); }

extern "C" int64_t hetero_attn_cpu_layout(int32_t which) {
    switch (which) {
        case 0: return HETERO_ATTN_CPU_ABI_VERSION;
        case 1: return sizeof(HaAttention);
        case 2: return sizeof(HaLinear);
        case 3: return sizeof(HaNorm);
    }
    return -1;
}
