#include "reduce.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"

namespace commlab {

namespace portable {
#define LANES_TARGET
#define LANES_BYTES 16
#include "reduce_loops.h"
}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {
#define LANES_TARGET __attribute__((target("avx2,f16c")))
#define LANES_BYTES 32
#include "reduce_loops.h"
}  // namespace avx2

namespace avx512 {
#define LANES_TARGET __attribute__((target("avx512f,avx512bw,avx2,f16c")))
#define LANES_BYTES 64
#include "reduce_loops.h"
}  // namespace avx512
#endif

const ReduceLoops& reduce_loops() {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512) return avx512::kReduceLoops;
  if (isa() == Isa::kAvx2) return avx2::kReduceLoops;
#endif
  return portable::kReduceLoops;
}

}  // namespace commlab
