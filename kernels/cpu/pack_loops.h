// The one loop behind pack and unpack. Included once per instruction set, as lanes.h tells.
#include "lanes.h"

// Writes past the caches, which spares reading the line first. Wants `to` aligned to what is written.
#if defined(__x86_64__)
#if LANES_BYTES == 16
LANES_INLINE void stream(void* to, I16 v) { _mm_stream_si64(static_cast<long long*>(to), (long long)v); }
LANES_INLINE void stream(void* to, I32 v) { _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)v); }
#elif LANES_BYTES == 32
LANES_INLINE void stream(void* to, I16 v) { _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)v); }
LANES_INLINE void stream(void* to, I32 v) { _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)v); }
#elif LANES_BYTES == 64
LANES_INLINE void stream(void* to, I16 v) { _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)v); }
LANES_INLINE void stream(void* to, I32 v) { _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)v); }
#endif
#endif
// fp64 is rare, and other processors have no such store in C++.
template <class Bits>
LANES_INLINE void stream(void* to, Bits v) {
  write(to, v);
}

// Remembers the largest magnitude seen, as an integer: that order puts inf above every finite number and NaN
// above inf. Signed integers, because SSE2 compares no others; a magnitude is never negative.
template <class T>
struct Magnitudes {
  using Bits = typename Lanes<T>::Bits;
  using Integer = std::decay_t<decltype(Bits{}[0])>;
  Bits largest{};

  LANES_TARGET __attribute__((always_inline)) inline void add(Bits bits) {
    const Bits magnitude = bits & std::numeric_limits<Integer>::max();
    largest = magnitude > largest ? magnitude : largest;
  }
  LANES_TARGET __attribute__((always_inline)) inline bool finite() const {
    bool all = true;
    for (std::size_t i = 0; i < sizeof(Bits) / sizeof(Integer); ++i) all &= largest[i] < infinity<T>();
    return all;
  }
};

template <class Dst, class Src>
LANES_INLINE auto computed(const Src* from, typename Lanes<Src>::Number factor, Magnitudes<Dst>& magnitudes) {
  static_assert(Lanes<Dst>::kNumel == Lanes<Src>::kNumel);
  const auto bits = Lanes<Dst>::encode(Lanes<Src>::load(from) * factor);
  magnitudes.add(bits);
  return bits;
}

// Fewer numbers than a register holds: through the same registers, from a padded copy.
template <class Dst, class Src, class Number>
LANES_INLINE void transfer_few(Dst* dst, const Src* src, std::size_t numel, Number factor,
                               Magnitudes<Dst>& magnitudes) {
  Src s[Lanes<Src>::kNumel] = {};
  Dst d[Lanes<Dst>::kNumel];
  std::memcpy(s, src, numel * sizeof(Src));
  write(d, computed(s, factor, magnitudes));
  std::memcpy(dst, d, numel * sizeof(Dst));
}

// Past the caches, in four strands side by side, each in turn for long enough to fill whole cache lines: one strand
// of reads leaves memory idle in between and takes 1.4x the time of a copy, four take 1.1x.
template <class Dst, class Src, class Number>
LANES_INLINE void transfer_strands(Dst* dst, const Src* src, std::size_t strand_numel, Number factor,
                                   Magnitudes<Dst>& magnitudes) {
  constexpr std::size_t kStep = Lanes<Dst>::kNumel;
  for (std::size_t turn = 0; turn < strand_numel; turn += kTurnNumel)
    for (std::size_t strand = 0; strand < kStrands; ++strand) {
      const std::size_t start = strand * strand_numel + turn;
#pragma GCC unroll 4
      for (std::size_t i = start; i < start + kTurnNumel; i += kStep)
        stream(dst + i, computed(src + i, factor, magnitudes));
    }
}

// dst = cast(src * scale); returns whether all of dst is finite.
template <class Dst, class Src>
LANES_TARGET bool transfer(Dst* dst, const Src* src, std::size_t numel, double scale, bool past_caches) {
  constexpr std::size_t kStep = Lanes<Dst>::kNumel;
  const auto factor = static_cast<typename Lanes<Src>::Number>(scale);
  Magnitudes<Dst> magnitudes;
  std::size_t i = 0;
  const std::size_t beyond = reinterpret_cast<std::uintptr_t>(dst) % (kStep * sizeof(Dst));
  // A dst that lies between two numbers never gets aligned.
  if (past_caches && beyond % sizeof(Dst) == 0) {
    if (beyond != 0) i = std::min(numel, kStep - beyond / sizeof(Dst));
    transfer_few(dst, src, i, factor, magnitudes);
    const std::size_t strand_numel = strand_numel_for(numel - i);
    transfer_strands(dst + i, src + i, strand_numel, factor, magnitudes);
    i += kStrands * strand_numel;
#pragma GCC unroll 4
    for (; i + kStep <= numel; i += kStep) stream(dst + i, computed(src + i, factor, magnitudes));
  } else {
#pragma GCC unroll 4
    for (; i + kStep <= numel; i += kStep) write(dst + i, computed(src + i, factor, magnitudes));
  }
  transfer_few(dst + i, src + i, numel - i, factor, magnitudes);
  return magnitudes.finite();
}

inline bool pack_piece(const Piece& piece, void* wire, DType wire_dtype, double scale, bool past_caches) {
  bool finite = true;
  with_pair(piece.dtype, wire_dtype, [&](auto tensor_tag, auto wire_tag) {
    using Tensor = typename decltype(tensor_tag)::type;
    using Wire = typename decltype(wire_tag)::type;
    finite = transfer(static_cast<Wire*>(wire) + piece.start, static_cast<const Tensor*>(piece.address), piece.numel,
                      scale, past_caches);
  });
  return finite;
}

inline void unpack_piece(const Piece& piece, const void* wire, DType wire_dtype, double scale, bool past_caches) {
  with_pair(piece.dtype, wire_dtype, [&](auto tensor_tag, auto wire_tag) {
    using Tensor = typename decltype(tensor_tag)::type;
    using Wire = typename decltype(wire_tag)::type;
    transfer(static_cast<Tensor*>(piece.address), static_cast<const Wire*>(wire) + piece.start, piece.numel, scale,
             past_caches);
  });
}

constexpr PackLoops kPackLoops{pack_piece, unpack_piece};

#include "lanes_end.h"
