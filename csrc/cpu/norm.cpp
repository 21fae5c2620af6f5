// y = rms_norm(x): hetero_attn/norm.py in one pass over each row, which stays in the first-level cache between the two.
#include "abi.h"
#include "norm.h"
#include "parallel.h"

namespace ha {
namespace {

constexpr int64_t PARALLEL_ELEMENTS = 1 << 15;       // below it waking another thread costs more than it saves

template <class T>
void norm_row(const T* x, const T* weight, T* y, int64_t channels, float eps, float offset, float* row) {
    int64_t i = 0;
    for (; i + W <= channels; i += W) store(row + i, load(x + i));
    for (; i < channels; ++i) row[i] = to_float(x[i]);
    float inverse = inverse_rms(row, channels, eps);
    for (i = 0; i + W <= channels; i += W) store(y + i, normed<T>(load(row + i), inverse, load(weight + i), offset));
    for (; i < channels; ++i) from_float(normed<T>(row[i], inverse, to_float(weight[i]), offset), y + i);
}

template <class T>
int run(const HaNorm& a) {
    std::atomic<int> status{0};
    int threads = a.rows * a.channels < PARALLEL_ELEMENTS ? 1 : a.threads;
    constexpr int64_t ROWS = 16;                     // of one work item
    parallel_for(a.parallel, threads, (a.rows + ROWS - 1) / ROWS, [&](int64_t item) {
        static thread_local Scratch scratch;
        float* row = scratch.take(a.channels);
        if (!row) {
            status = 2;
            return;
        }
        for (int64_t r = item * ROWS; r < std::min(a.rows, (item + 1) * ROWS); ++r)
            norm_row(static_cast<const T*>(a.x) + r * a.x_stride, static_cast<const T*>(a.weight), static_cast<T*>(a.y) + r * a.channels,
                     a.channels, a.eps, a.offset, row);
    });
    return status;
}

}  // namespace
}  // namespace ha

extern "C" int hetero_attn_cpu_rms_norm(const HaNorm* call) {
    if (call->abi_version != HETERO_ATTN_CPU_ABI_VERSION) return 1;
    switch (call->dtype) {
        case HA_F32: return ha::run<float>(*call);
        case HA_F16: return ha::run<ha::f16>(*call);
        case HA_BF16: return ha::run<ha::bf16>(*call);
    }
    return 3;
}
