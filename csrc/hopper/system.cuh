// Memory that all ranks touch, by PTX on the device and by csrc/simt on the CPU: 16 bytes relaxed at system scope, flags that release and
// acquire, the switch's reduce and broadcast (multimem), and a clock.
//
// The data's accesses are relaxed and not plain: several devices make them, and only a release and an acquire order them (barrier.cuh). The
// CPU's executor can hold relaxed stores back and serve relaxed loads from before (csrc/simt/weak_memory.h), so a missing order shows there.
#pragma once
#include "call.h"
#include "numbers.cuh"

#if defined(SIMT)
static __device__ __forceinline__ Vector load_relaxed(unsigned long long address) {
  Vector vector;
  simt::simt_system_load(&vector, reinterpret_cast<const void*>(address), 16);
  return vector;
}
static __device__ __forceinline__ void store_relaxed(unsigned long long address, const Vector& vector) {
  simt::simt_system_store(reinterpret_cast<void*>(address), &vector, 16);
}
static __device__ __forceinline__ void put_release(unsigned long long address, unsigned long long word) {
  simt::simt_flag_store(reinterpret_cast<uint64_t*>(address), word, 1);
}
static __device__ __forceinline__ void put_relaxed(unsigned long long address, unsigned long long word) {
  simt::simt_flag_store(reinterpret_cast<uint64_t*>(address), word, 0);
}
static __device__ __forceinline__ unsigned long long get_acquire(unsigned long long address) {
  return simt::simt_flag_load(reinterpret_cast<const uint64_t*>(address), 1, __FILE__, __LINE__);
}
static __device__ __forceinline__ unsigned long long get_relaxed(unsigned long long address) {
  return simt::simt_flag_load(reinterpret_cast<const uint64_t*>(address), 0, __FILE__, __LINE__);
}
static __device__ __forceinline__ unsigned long long nanoseconds() { return simt::simt_nanoseconds(); }
#else
static __device__ __forceinline__ Vector load_relaxed(unsigned long long address) {
  Vector v;
  asm volatile("ld.relaxed.sys.global.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "l"(address) : "memory");
  return v;
}
static __device__ __forceinline__ void store_relaxed(unsigned long long address, const Vector& v) {
  asm volatile("st.relaxed.sys.global.v4.b32 [%0], {%1,%2,%3,%4};"
               :: "l"(address), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3]) : "memory");
}
static __device__ __forceinline__ void put_release(unsigned long long address, unsigned long long word) {
  asm volatile("st.release.sys.global.b64 [%0], %1;" :: "l"(address), "l"(word) : "memory");
}
static __device__ __forceinline__ void put_relaxed(unsigned long long address, unsigned long long word) {
  asm volatile("st.relaxed.sys.global.b64 [%0], %1;" :: "l"(address), "l"(word) : "memory");
}
static __device__ __forceinline__ unsigned long long get_acquire(unsigned long long address) {
  unsigned long long word;
  asm volatile("ld.acquire.sys.global.b64 %0, [%1];" : "=l"(word) : "l"(address) : "memory");
  return word;
}
static __device__ __forceinline__ unsigned long long get_relaxed(unsigned long long address) {
  unsigned long long word;
  asm volatile("ld.relaxed.sys.global.b64 %0, [%1];" : "=l"(word) : "l"(address) : "memory");
  return word;
}
static __device__ __forceinline__ unsigned long long nanoseconds() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}
#endif

#if defined(MULTIMEM)
// The sum over all ranks of the 16 bytes at `at` of their symmetric memory, in fp32, rounded once to the format: made by the switch. On the
// CPU in rank order, as the unicast twin makes it.
static __device__ __forceinline__ Vector multimem_sum(const Call& call, unsigned long long at) {
  Vector v;
#if defined(SIMT)
  Eight total = {}, part;
  for (int rank = 0; rank < call.world; rank++) {
    unpack(load_relaxed(call.buffer[rank] + at), X_KIND, 0, part);
    for (int i = 0; i < 16 / X_BYTES; i++) total.at[i] += part.at[i];
  }
  v = pack(total, X_KIND, 0);
#else
  const unsigned long long address = call.multicast + at;
#if X_KIND == 1
  asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "l"(address) : "memory");
#elif X_KIND == 2
  asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "l"(address) : "memory");
#else
  float f[4];
  asm volatile("multimem.ld_reduce.relaxed.sys.global.add.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(f[0]), "=f"(f[1]), "=f"(f[2]), "=f"(f[3]) : "l"(address) : "memory");
  for (int i = 0; i < 4; i++) v.word[i] = __float_as_uint(f[i]);
#endif
#endif
  return v;
}

// Write 16 bytes at `at` of every rank's symmetric memory.
static __device__ __forceinline__ void multimem_store(const Call& call, unsigned long long at, const Vector& v) {
#if defined(SIMT)
  for (int rank = 0; rank < call.world; rank++) store_relaxed(call.buffer[rank] + at, v);
#else
  asm volatile("multimem.st.relaxed.sys.global.v4.f32 [%0], {%1,%2,%3,%4};"
               :: "l"(call.multicast + at), "f"(__uint_as_float(v.word[0])), "f"(__uint_as_float(v.word[1])),
                  "f"(__uint_as_float(v.word[2])), "f"(__uint_as_float(v.word[3])) : "memory");
#endif
}
#endif
