// Volta's tensor-core step on the CPU: mma.sync.m8n8k4 with half inputs and fp32 sums, as the PTX ISA defines its fragments.
//
// Four quad pairs (lanes 4q..4q+3 and 16+4q..16+4q+3) each multiply 8x4 by 4x8. The tensor core adds four products to the sum with one
// rounding; here each product is added in turn: the difference is one of rounding in fp32.
#pragma once
#include <cstdint>

#include "half.h"
#include "runtime.h"

namespace simt {

struct MmaArgument {
  float* sums;                                         // 8
  const uint32_t *a, *b;                               // 4 halves each
};

inline void unpack(const uint32_t* pairs, float values[4]) {
  for (int i = 0; i < 4; i++) values[i] = half_to_float(uint16_t(pairs[i / 2] >> 16 * (i % 2)));
}

// b_row: B is given by rows (a lane holds 4 columns of row lane % 4) and not by columns (a lane holds the 4 rows of its column).
template <bool b_row>
void mma_m8n8k4_warp(void** all, uint32_t) {
  for (int quad = 0; quad < 4; quad++) {
    float a[8][4], b[4][8], c[8][8] = {};
    MmaArgument* lanes[8];
    for (int i = 0; i < 8; i++) {                      // the lane's place among the eight
      lanes[i] = static_cast<MmaArgument*>(all[4 * quad + i % 4 + 16 * (i / 4)]);
      float held[4];
      unpack(lanes[i]->a, a[i]);
      unpack(lanes[i]->b, held);
      for (int v = 0; v < 4; v++)
        if (b_row) b[i % 4][v + 4 * (i / 4)] = held[v];
        else b[v][i] = held[v];
    }
    for (int i = 0; i < 8; i++)
      for (int v = 0; v < 8; v++) c[(i & 1) + (v & 2) + (i & 4)][(i & 2) + (v & 1) + (v & 4)] = lanes[i]->sums[v];
    for (int m = 0; m < 8; m++)
      for (int k = 0; k < 4; k++)
        for (int n = 0; n < 8; n++) c[m][n] += a[m][k] * b[k][n];
    for (int i = 0; i < 8; i++)
      for (int v = 0; v < 8; v++) lanes[i]->sums[v] = c[(i & 1) + (v & 2) + (i & 4)][(i & 2) + (v & 1) + (v & 4)];
  }
}

}  // namespace simt
