// Where CTA b of this rank meets CTA b of all others, and what they tell one another there.
//
// Each rank has a slot for each CTA of each other rank in its own symmetric memory. A CTA writes its word into the slot that is its own on
// every rank (release), and waits until all slots of its own row hold this meeting's number (acquire). So what it wrote before is seen by
// all who have met it. A rank may be one meeting ahead of another and not two, hence two sets of slots in turn. The number of meetings is
// counted in device memory: a CUDA graph that is replayed counts on.
//
// word:   16 bits epoch | 16 bits signature of the call | 32 bits offset of the rank's tensor / 16
// status: 8 bits reason | 8 bits rank | 8 bits channel | 8 bits meeting of the call | 32 bits number of the call
//
// Every wait ends: at the time-out the first CTA to find out writes the status, the others give up, and the kernels behind do not begin.
// TokenWeave (arXiv 2505.11329) lets the first put be relaxed; then nothing orders the summand that a kernel before has written.
#pragma once
#include "system.cuh"

enum Reason : int { LATE = 1, OUT_OF_STEP = 2, GAVE_UP = 3 };     // did not come; made another call

struct Meeting {                       // a block's, in shared memory
  unsigned long long tensor[MAX_RANKS];    // each rank's tensor, by what it told: an address
  long long offset[MAX_RANKS];
};

static __device__ __forceinline__ unsigned long long slot_of(const Call& call, int in_rank, unsigned epoch, int channel, int of_rank) {
  return call.buffer[in_rank] + SLOT_BYTES * ((unsigned long long)((epoch & 1) * CHANNELS + channel) * MAX_RANKS + of_rank);
}
static __device__ __forceinline__ unsigned* own_word(const Call& call, int at) {
  return reinterpret_cast<unsigned*>(call.buffer[call.rank] + at);
}

// Wait for one rank's word. 0, or the reason why there is none; GAVE_UP: another CTA of this rank has found one, and has told it.
static __device__ __forceinline__ int await(const Call& call, unsigned long long slot, unsigned epoch, unsigned long long& word) {
  const unsigned long long began = nanoseconds();
  for (;;) {
    word = get_acquire(slot);
    if ((unsigned)(word >> 48) == (epoch & 0xffff)) return (unsigned)(word >> 32 & 0xffff) == (call.signature & 0xffff) ? 0 : OUT_OF_STEP;
    if (*(volatile unsigned*)own_word(call, BROKEN_AT)) return GAVE_UP;
    if (nanoseconds() - began > (unsigned long long)call.timeout_ns) return LATE;
  }
}

// Meet the others. meeting: of this call, 1, 2, …; `told` then holds where each rank's tensor is. False: give up, all threads alike.
static __device__ bool meet(const Call& call, int channel, unsigned epoch, int which, Meeting& told) {
  __syncthreads();                     // what all threads of the block have read and written comes before the word
  int wrong = 0;
  const int other = threadIdx.x;
  if (other < call.world) {
    const unsigned long long mine = (unsigned long long)(epoch & 0xffff) << 48 | (unsigned long long)(call.signature & 0xffff) << 32 |
                                    (unsigned)(call.offset / 16);
    unsigned long long word = 0;
    put_release(slot_of(call, other, epoch, channel, call.rank), mine);
    wrong = await(call, slot_of(call, call.rank, epoch, channel, other), epoch, word);
    told.offset[other] = 16 * (long long)(unsigned)word;
    told.tensor[other] = call.buffer[other] + told.offset[other];
    if (wrong && wrong != GAVE_UP && atomicCAS(own_word(call, BROKEN_AT), 0u, 1u) == 0u) {     // the first to find out tells
      put_relaxed(call.status, (unsigned long long)wrong << 56 | (unsigned long long)other << 48 | (unsigned long long)channel << 40 |
                               (unsigned long long)which << 32 | call.number);
    }
  }
  return !__syncthreads_or(wrong);
}

// How often this CTA has met the others, before this call; nobody begins once a wait has failed.
static __device__ __forceinline__ bool begins(const Call& call, int channel, unsigned& epoch) {
  epoch = *(own_word(call, EPOCHS_AT) + channel);
  return !__syncthreads_or(*own_word(call, BROKEN_AT) != 0);
}
static __device__ __forceinline__ void ends(const Call& call, int channel, unsigned epoch) {
  if (threadIdx.x == 0) *(own_word(call, EPOCHS_AT) + channel) = epoch;
}
