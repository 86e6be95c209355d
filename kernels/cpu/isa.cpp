#include "isa.h"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace commlab {

#if defined(__x86_64__)
namespace {

struct Features {
  bool avx2 = false, avx512 = false;
};

// Asked of the processor itself, as in crc32c.cpp: compilers other than GCC answer __builtin_cpu_supports only after a
// start-up call. XCR0 says which registers the operating system keeps for a thread: bits 1 and 2 those of 32 bytes,
// 5 to 7 those of 64.
Features asked() {
  Features found;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return found;
  const bool f16c = (c & bit_F16C) != 0;
  unsigned kept, high;
  __asm__ volatile("xgetbv" : "=a"(kept), "=d"(high) : "c"(0));
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  found.avx2 = (kept & 0x06) == 0x06 && f16c && (b & bit_AVX2);
  found.avx512 = (kept & 0xe6) == 0xe6 && found.avx2 && (b & bit_AVX512F) && (b & bit_AVX512BW);
  return found;
}

}  // namespace
#endif

bool has_isa(Isa isa) {
#if defined(__x86_64__)
  static const Features features = asked();
  switch (isa) {
    case Isa::kPortable: return true;
    case Isa::kAvx2: return features.avx2;
    case Isa::kAvx512: return features.avx512;
  }
  return false;
#else
  return isa == Isa::kPortable;
#endif
}

static Isa widest() {
  if (has_isa(Isa::kAvx512)) return Isa::kAvx512;
  return has_isa(Isa::kAvx2) ? Isa::kAvx2 : Isa::kPortable;
}

static std::atomic<Isa>& current() {
  static std::atomic<Isa> chosen{widest()};
  return chosen;
}

Isa isa() { return current().load(std::memory_order_relaxed); }

bool set_isa(Isa isa) {
  if (!has_isa(isa)) return false;
  current().store(isa, std::memory_order_relaxed);
  return true;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2: return "avx2+f16c";
    case Isa::kAvx512: return "avx512";
    default: return "portable";
  }
}

}  // namespace commlab
