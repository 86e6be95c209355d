#include "pack.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"

namespace commlab {
namespace {

// From this many bytes read and written on, what is written would leave the caches before anybody reads it.
constexpr std::size_t kPastCachesBytes = 8 << 20;

constexpr std::size_t kStrands = 4;
constexpr std::size_t kTurnNumel = 32;

// How much of a tensor each strand takes; the little left over follows one by one. Not a multiple of 4 KiB, as a
// quarter of a weight matrix mostly is: the first cache and the store queue tell addresses apart by their last 12
// bits, and strands that agree in these get in each other's way (1.3x the time). So: 1 KiB of fp32 apart, modulo 4.
constexpr std::size_t strand_numel_for(std::size_t numel) {
  const std::size_t whole_pages = numel / kStrands / 1024 * 1024;
  return whole_pages == 0 ? 0 : whole_pages - 768;
}

struct PackLoops {
  bool (*pack)(const Piece& piece, void* wire, DType wire_dtype, double scale, bool past_caches);
  void (*unpack)(const Piece& piece, const void* wire, DType wire_dtype, double scale, bool past_caches);
};

// The bits of +inf, as a number.
template <class T>
constexpr std::int64_t infinity() {
  if constexpr (std::is_same_v<T, Fp16>) return 0x7c00;
  if constexpr (std::is_same_v<T, Bf16>) return 0x7f80;
  if constexpr (std::is_same_v<T, float>) return 0x7f800000;
  return 0x7ff0000000000000;
}

// Calls fn(Tag<tensor's type>, Tag<wire's type>).
template <class Fn>
void with_pair(DType tensor, DType wire, Fn fn) {
  if (wire == DType::kFloat64) return fn(Tag<double>{}, Tag<double>{});
  const auto with_wire = [&](auto wire_tag) {
    switch (tensor) {
      case DType::kFloat32: return fn(Tag<float>{}, wire_tag);
      case DType::kFloat64: return fn(Tag<Fp64InFp32>{}, wire_tag);
      case DType::kFloat16: return fn(Tag<Fp16>{}, wire_tag);
      default: return fn(Tag<Bf16>{}, wire_tag);
    }
  };
  wire == DType::kFloat32 ? with_wire(Tag<float>{}) : with_16bit(wire, with_wire);
}

namespace portable {
#define LANES_TARGET
#define LANES_BYTES 16
#include "pack_loops.h"
}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {
#define LANES_TARGET __attribute__((target("avx2,f16c")))
#define LANES_BYTES 32
#include "pack_loops.h"
}  // namespace avx2

namespace avx512 {
#define LANES_TARGET __attribute__((target("avx512f,avx512bw,avx2,f16c")))
#define LANES_BYTES 64
#include "pack_loops.h"
}  // namespace avx512
#endif

const PackLoops& pack_loops() {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512) return avx512::kPackLoops;
  if (isa() == Isa::kAvx2) return avx2::kPackLoops;
#endif
  return portable::kPackLoops;
}

bool goes_past_caches(const Piece* pieces, std::size_t count, DType wire_dtype) {
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < count; ++i)
    bytes += pieces[i].numel * (dtype_bytes(pieces[i].dtype) + dtype_bytes(wire_dtype));
  return bytes >= kPastCachesBytes;
}

// Stores past the caches are ordered with nothing: without this fence a peer could see the flag that says
// "packed" before it sees the numbers.
void publish(bool past_caches) {
#if defined(__x86_64__)
  if (past_caches) _mm_sfence();
#else
  (void)past_caches;
#endif
}

}  // namespace

bool can_pack(DType tensor, DType wire) {
  return is_float(tensor) && is_float(wire) && (wire != DType::kFloat64 || tensor == DType::kFloat64);
}

bool pack(const Piece* pieces, std::size_t count, void* wire, DType wire_dtype, double scale) {
  const PackLoops& loops = pack_loops();
  const bool past_caches = goes_past_caches(pieces, count, wire_dtype);
  bool finite = true;
  for (std::size_t i = 0; i < count; ++i) finite &= loops.pack(pieces[i], wire, wire_dtype, scale, past_caches);
  publish(past_caches);
  return finite;
}

void unpack(const Piece* pieces, std::size_t count, const void* wire, DType wire_dtype, double scale) {
  const PackLoops& loops = pack_loops();
  const bool past_caches = goes_past_caches(pieces, count, wire_dtype);
  for (std::size_t i = 0; i < count; ++i) loops.unpack(pieces[i], wire, wire_dtype, scale, past_caches);
  publish(past_caches);
}

}  // namespace commlab
