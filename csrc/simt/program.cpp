// One .cu as a program of the executor: hetero_attn/testing/simt.py compiles this file with
//   SIMT_SOURCE   the .cu, quoted
//   SIMT_KERNELS  SIMT_KERNEL(name) for each of its kernels
//   SIMT_DYNAMIC_TYPE, SIMT_DYNAMIC_NAME   how it declares its dynamic shared memory (extern __shared__ TYPE NAME[]), if it does
//   SIMT_COUNTED  to count and check its accesses (with -fsanitize=thread)
#include <link.h>
#include <utility>

#include "simt/cuda.h"
#if defined(SIMT_COUNTED)
#include "simt/access_hooks.h"
#endif

constexpr size_t SIMT_CAPACITY = 256 << 10;           // more than any device gives a block
#if !defined(SIMT_DYNAMIC_NAME)
#define SIMT_DYNAMIC_TYPE unsigned char
#define SIMT_DYNAMIC_NAME simt_no_dynamic_array
#endif
alignas(128) thread_local SIMT_DYNAMIC_TYPE SIMT_DYNAMIC_NAME[SIMT_CAPACITY / sizeof(SIMT_DYNAMIC_TYPE)];

#include SIMT_SOURCE

namespace {

template <class... A, size_t... I>
__attribute__((no_sanitize("thread"))) void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_const_t<A>*>(arguments[I])...);
}
template <class... A>
__attribute__((no_sanitize("thread"))) void call(void (*kernel)(A...), void** arguments) {
  call(kernel, arguments, std::index_sequence_for<A...>{});
}

}  // namespace

#define SIMT_KERNEL(name) \
  extern "C" SIMT_API __attribute__((no_sanitize("thread"))) void simt_entry_##name(void** arguments) { call(name, arguments); }
SIMT_KERNELS

// Everything thread_local in this object is a shared variable, so its thread-local block is the shared memory.
extern "C" SIMT_API void simt_find_shared(simt::SharedMemory* found) {
  found->dynamic = reinterpret_cast<char*>(SIMT_DYNAMIC_NAME);
  found->dynamic_capacity = SIMT_CAPACITY;
  found->begin = found->dynamic;
  found->size = SIMT_CAPACITY;
  auto look = [](dl_phdr_info* object, size_t, void* into) {
    auto* shared = static_cast<simt::SharedMemory*>(into);
    for (int i = 0; i < object->dlpi_phnum; i++) {
      if (object->dlpi_phdr[i].p_type != PT_TLS) continue;
      char* begin = static_cast<char*>(object->dlpi_tls_data);
      if (!begin || shared->dynamic < begin || shared->dynamic >= begin + object->dlpi_phdr[i].p_memsz) continue;
      shared->begin = begin;
      shared->size = object->dlpi_phdr[i].p_memsz;
      return 1;
    }
    return 0;
  };
  dl_iterate_phdr(look, found);
}
