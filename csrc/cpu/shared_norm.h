// The rows of all_reduce_rms_norm: sum over ranks, (post norm), residual add, RMSNorm, written to every rank, while the row is in the
// first-level cache. Follows hetero_attn/norm.py's two orders of rounding, and rounds the sum to x's dtype before the add as the unfused
// form does, so that switching the fusion on or off does not change a 16-bit model's greedy answer more than the order of a sum does.
#pragma once
#include "norm.h"
#include "shared_sum.h"

namespace ha {

struct NormWeights {
    const float *weight, *post_weight;       // [channels]; post_weight may be null
    float eps, offset;
};

// One row: ends.from are the ranks' x (dtype T), residual (dtype R) is updated, ends.to get the result (dtype T). y [channels]: scratch.
template <class T, class R>
void reduce_add_norm_row(const Ends& ends, R* residual, const NormWeights& with, int64_t channels, float* y) {
    const float* post = with.post_weight;
    int64_t i = 0;
    auto partial = [&](int r) { return reinterpret_cast<const T*>(ends.from[r]); };
    float inverse = 0.0f;
    if (post) {
        for (i = 0; i + W <= channels; i += W) {
            vf total = load(partial(0) + i);
            for (int r = 1; r < ends.froms; ++r) total += load(partial(r) + i);
            store(y + i, rounded<T>(total));
        }
        for (; i < channels; ++i) {
            float total = to_float(partial(0)[i]);
            for (int r = 1; r < ends.froms; ++r) total += to_float(partial(r)[i]);
            y[i] = rounded<T>(total);
        }
        inverse = inverse_rms(y, channels, with.eps);
    }
    for (i = 0; i + W <= channels; i += W) {
        vf total;
        if (post) total = normed<T>(load(y + i), inverse, load(post + i), with.offset);
        else {
            total = load(partial(0) + i);
            for (int r = 1; r < ends.froms; ++r) total += load(partial(r) + i);
            total = rounded<T>(total);
        }
        vf sum = load(residual + i) + total;
        store(residual + i, sum);
        store(y + i, rounded<R>(sum));
    }
    for (; i < channels; ++i) {
        float total;
        if (post) total = normed<T>(y[i], inverse, post[i], with.offset);
        else {
            total = to_float(partial(0)[i]);
            for (int r = 1; r < ends.froms; ++r) total += to_float(partial(r)[i]);
            total = rounded<T>(total);
        }
        from_float(to_float(residual[i]) + total, residual + i);
        y[i] = to_float(residual[i]);
    }
    inverse = inverse_rms(y, channels, with.eps);
    for (i = 0; i + W <= channels; i += W) {
        vf out = normed<R>(load(y + i), inverse, load(with.weight + i), with.offset);
        for (int d = 0; d < ends.tos; ++d) store(reinterpret_cast<T*>(ends.to[d]) + i, out);
    }
    for (; i < channels; ++i) {
        float out = normed<R>(y[i], inverse, with.weight[i], with.offset);
        for (int d = 0; d < ends.tos; ++d) from_float(out, reinterpret_cast<T*>(ends.to[d]) + i);
    }
}

}  // namespace ha
