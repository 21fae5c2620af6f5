// The entry: from a call's dtype to its kernels.
#include <new>

#include "attention.h"

extern "C" int hetero_attn_cpu_attention(const HaAttention* call) {
    if (call->abi_version != HETERO_ATTN_CPU_ABI_VERSION) return 1;
    try {
        switch (call->dtype) {
            case HA_F32: return ha::attend_f32(*call);
            case HA_F16: return ha::attend_f16(*call);
            case HA_BF16: return ha::attend_bf16(*call);
        }
    } catch (const std::bad_alloc&) {
        return 2;
    }
    return 3;
}
