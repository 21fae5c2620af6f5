// What csrc/volta/fragments.cuh and call.h compute, written down for tests/test_volta_relayout.py to compare with their Python twins.
#include "volta/call.h"
#include "volta/fragments.cuh"

extern "C" __global__ void maps(int* out) {
  const int lane = threadIdx.x;
  int* to = out + lane * 128;
  *to++ = a_row(lane);
  *to++ = b_key(lane);
  *to++ = b_feature(lane);
  for (int v1 = 0; v1 < 2; v1++) *to++ = sum_row(lane, v1);
  for (int e = 0; e < 8; e++) *to++ = sum_column(lane, e);
  for (int t = 0; t < 4; t++) *to++ = weight_position(lane, t);
  for (int step = 0; step < 16; step++) *to++ = key_at(lane, step);
}

// How far apart the ends of call.h's struct and of some fields lie.
extern "C" __global__ void layout(int* out) {
  Call call;
  const char* begin = reinterpret_cast<const char*>(&call);
  out[0] = int(sizeof(Call));
  out[1] = int(reinterpret_cast<const char*>(call.q_stride) - begin);
  out[2] = int(reinterpret_cast<const char*>(&call.batch) - begin);
  out[3] = int(reinterpret_cast<const char*>(&call.softcap) - begin);
}
