#include "isa.h"

#include <atomic>

namespace commlab {

bool has_isa(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kPortable: return true;
    case Isa::kAvx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    case Isa::kAvx512: return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
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
