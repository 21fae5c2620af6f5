// Where an instrumented program's accesses are seen. g++ -fsanitize=thread puts a call before every load and store that may leave the
// thread's registers; that sanitizer's library is not linked, these are. The place is the caller's return address: one load or store in
// the machine code is one place, as one instruction is on the device.
#pragma once
#include "runtime.h"

#define SIMT_HOOK extern "C" __attribute__((no_sanitize("thread"), noinline, used, visibility("hidden"))) void
#define SIMT_HOOKS(bytes)                                                                                            \
  SIMT_HOOK __tsan_read##bytes(void* at) { simt::simt_access(__builtin_return_address(0), at, bytes, 0); }           \
  SIMT_HOOK __tsan_write##bytes(void* at) { simt::simt_access(__builtin_return_address(0), at, bytes, 1); }          \
  SIMT_HOOK __tsan_unaligned_read##bytes(void* at) { simt::simt_access(__builtin_return_address(0), at, bytes, 0); } \
  SIMT_HOOK __tsan_unaligned_write##bytes(void* at) { simt::simt_access(__builtin_return_address(0), at, bytes, 1); }
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
SIMT_HOOK __tsan_read_range(void* at, unsigned long bytes) { simt::simt_access(__builtin_return_address(0), at, unsigned(bytes), 0); }
SIMT_HOOK __tsan_write_range(void* at, unsigned long bytes) { simt::simt_access(__builtin_return_address(0), at, unsigned(bytes), 1); }
SIMT_HOOK __tsan_init() {}
SIMT_HOOK __tsan_func_entry(void*) {}
SIMT_HOOK __tsan_func_exit() {}
#undef SIMT_HOOKS
#undef SIMT_HOOK
