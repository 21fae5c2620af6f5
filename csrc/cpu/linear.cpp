// y = x · weightᵀ + bias: checks the call, and chooses by the number of rows of x between reading the weight at the memory's speed
// (linear_few.h) and multiplying at the cores' (linear_many.h). How work is cut follows from the shape alone, so the bits of a result
// are the same for any number of threads.
#include "linear_few.h"
#include "linear_many.h"

namespace ha {
namespace {

// A product smaller than this is done before another thread has woken up.
constexpr double ALONE_PRODUCTS = 1 << 16;

template <class T>
int run(const HaLinear& call) {
    HaLinear a = call;
    if (a.m <= 0 || a.n <= 0) return 0;
    if (a.k <= 0) {                                                      // an empty sum: the bias, or zeros
        for (int64_t m = 0; m < a.m; ++m)
            for (int64_t n = 0; n < a.n; ++n)
                from_float(a.bias ? to_float(static_cast<const T*>(a.bias)[n]) : 0.0f, static_cast<T*>(a.y) + m * a.y_stride + n);
        return 0;
    }
    if ((double)a.m * a.n * a.k < ALONE_PRODUCTS) a.threads = 1;
    return a.m <= FEW_ROWS<T> ? linear_few_rows<T>(a) : linear_many_rows<T>(a);
}

}  // namespace
}  // namespace ha

extern "C" int hetero_attn_cpu_linear(const HaLinear* call) {
    if (call->abi_version != HETERO_ATTN_CPU_ABI_VERSION) return 1;
    switch (call->dtype) {
        case HA_F32: return ha::run<float>(*call);
        case HA_F16: return ha::run<ha::f16>(*call);
        case HA_BF16: return ha::run<ha::bf16>(*call);
    }
    return 3;
}
