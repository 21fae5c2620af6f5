// What a collective is told, by value: the kernels' one argument. Python twin: backends/hetero_attn_hopper/abi.py (and layout.py for the
// symmetric memory's map). Every field is naturally aligned and there is no padding.
#pragma once

constexpr int MAX_RANKS = 16;
constexpr int MAX_CTAS = 32;           // of one call; a one-shot call has slots of its own behind them
constexpr int CHANNELS = 2 * MAX_CTAS;
constexpr int UNIT = 8;                // elements that are moved together: 16 bytes of halves, 32 of fp32

// Symmetric memory begins with what the ranks' CTAs meet by:
//   slots   [2 phases][CHANNELS][MAX_RANKS] of 8 bytes: where rank r's CTA tells this one's that it has come (barrier.cuh)
//   epochs  [CHANNELS] of 4 bytes: how often this rank's CTA has met the others'; nobody else reads them
//   broken  4 bytes: a wait has ended in a time-out, and no kernel waits again
constexpr int SLOT_BYTES = 8;
constexpr int SLOTS_BYTES = 2 * CHANNELS * MAX_RANKS * SLOT_BYTES;
constexpr int EPOCHS_AT = SLOTS_BYTES;
constexpr int BROKEN_AT = EPOCHS_AT + 4 * CHANNELS;

struct Call {
  unsigned long long buffer[MAX_RANKS];    // every rank's symmetric memory, as this rank reaches it
  unsigned long long multicast;            // the same byte of all of them at once; 0 = there is no such address
  unsigned long long status;               // 8 bytes of the host's memory: why a call failed (barrier.cuh)
  unsigned long long source, out;          // memory of this rank alone: all_gather's x and one_shot's x; what is written for this rank
  unsigned long long residual, weight, post_weight;
  long long offset;                        // of this rank's tensor in its symmetric memory: x, or all_gather's result; a multiple of 16
  long long first, count;                  // units of UNIT elements that are this rank's own; of 16 bytes for all_gather
  long long elements;                      // one_shot: of x
  long long timeout_ns;
  int rank, world;
  int hidden;                              // channels of a row; first and count are rows then
  int residual_kind, weight_kind;          // F32, BF16, F16 (numbers.cuh)
  unsigned signature;                      // 16 bits of operation, dtype and sizes: must be every rank's
  unsigned number;                         // of the call, for its error
  float eps, weight_offset;
  int staging_units;                       // one_shot: of one of the two staging buffers
  long long staging;                       // one_shot: where they begin in symmetric memory
};
