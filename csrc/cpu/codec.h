// The C ABI of the low-bit codecs between backends/hetero_attn_cpu/codec_calls.py (ctypes) and codec.cpp. What the bytes mean is written
// down once, in hetero_attn/collectives/codec/definition.py; these functions write and read the same ones. One thread each: a caller
// with more cuts the values at a multiple of 32 (groups) or at a row (features).
#pragma once
#include <cstdint>

#define HA_CODEC_API __attribute__((visibility("default")))

extern "C" {

// Tables of one sender: scale (Inf at outliers), step and mean (-0 at outliers) [features], outlier [outliers] ascending features; `wide`
// of the call's values are outliers'; it touches `rows` rows that have a factor (0: none has). body: the outliers' bf16, the factors' bf16,
// the nibbles of the rest.
//
// values of dtype HA_F32, HA_F16 or HA_BF16, any address. pack returns how many values saturated (groups never do), -1 where one is NaN or
// Inf (the body is then undefined), -2 for an unknown dtype. unpack writes out fp32, or adds to it.
HA_CODEC_API int64_t hetero_attn_cpu_pack_groups(const void* values, int32_t dtype, int64_t count, int32_t bits, uint8_t* body);
HA_CODEC_API void hetero_attn_cpu_unpack_groups(const uint8_t* body, int64_t count, int32_t bits, float* out, int32_t accumulate);
HA_CODEC_API int64_t hetero_attn_cpu_pack_features(const void* values, int32_t dtype, int64_t first, int64_t count, int64_t features,
                                                   int64_t outliers, const float* scale, const float* mean, const int32_t* outlier,
                                                   int64_t wide, int64_t rows, uint8_t* body);
HA_CODEC_API void hetero_attn_cpu_unpack_features(const uint8_t* body, int64_t first, int64_t count, int64_t features, int64_t outliers,
                                                  const float* step, const float* mean, const int32_t* outlier, int64_t wide, int64_t rows,
                                                  float* out, int32_t accumulate);
}
