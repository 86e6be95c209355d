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
  LANES_TARGET bool finite() const {
    bool all = true;
    for (std::size_t i = 0; i < sizeof(Bits) / sizeof(Integer); ++i) all &= largest[i] < infinity<T>();
    return all;
  }
};

// dst = cast(src * factor), kStep numbers at a time.
template <class Dst, class Src>
struct Transfer {
  using D = Lanes<Dst>;
  using S = Lanes<Src>;
  static_assert(D::kNumel == S::kNumel);
  static constexpr std::size_t kStep = D::kNumel;
  // Memory answers one strand of reads faster than it is asked and four faster still: blocks are read in four
  // strands side by side, each in turn long enough to fill whole cache lines on both sides.
  static constexpr std::size_t kStrands = 4;
  static constexpr std::size_t kTurn = 4 * kStep;
  static constexpr std::size_t kStrandNumel = 16384;

  Dst* dst;
  const Src* src;
  typename S::Number factor;
  Magnitudes<Dst> magnitudes{};

  LANES_TARGET __attribute__((always_inline)) inline typename D::Bits computed(const Src* from) {
    const auto bits = D::encode(S::load(from) * factor);
    magnitudes.add(bits);
    return bits;
  }

  // Fewer numbers than a register holds: through the same registers, from a padded copy.
  LANES_TARGET void ragged(std::size_t i, std::size_t count) {
    Src s[kStep] = {};
    Dst d[kStep];
    std::memcpy(s, src + i, count * sizeof(Src));
    write(d, computed(s));
    std::memcpy(dst + i, d, count * sizeof(Dst));
  }

  // From number i on through the caches; returns where it stopped.
  LANES_TARGET std::size_t cached(std::size_t i, std::size_t numel) {
#pragma GCC unroll 4
    for (; i + kStep <= numel; i += kStep) write(dst + i, computed(src + i));
    return i;
  }

  // From number i on past the caches; returns where it stopped. dst + i is aligned to what is written.
  LANES_TARGET std::size_t streamed(std::size_t i, std::size_t numel) {
    for (; i + kStrands * kStrandNumel <= numel; i += kStrands * kStrandNumel)
      for (std::size_t turn = i; turn < i + kStrandNumel; turn += kTurn)
        for (std::size_t strand = turn; strand < turn + kStrands * kStrandNumel; strand += kStrandNumel)
#pragma GCC unroll 4
          for (std::size_t k = strand; k < strand + kTurn; k += kStep) stream(dst + k, computed(src + k));
#pragma GCC unroll 4
    for (; i + kStep <= numel; i += kStep) stream(dst + i, computed(src + i));
    return i;
  }

  LANES_TARGET bool run(std::size_t numel, bool past_caches) {
    std::size_t i = 0;
    const std::size_t beyond = reinterpret_cast<std::uintptr_t>(dst) % (kStep * sizeof(Dst));
    // A dst that lies between two numbers is never aligned.
    if (past_caches && beyond % sizeof(Dst) == 0) {
      if (beyond != 0) {
        i = std::min(numel, kStep - beyond / sizeof(Dst));
        ragged(0, i);
      }
      i = streamed(i, numel);
    } else {
      i = cached(i, numel);
    }
    if (i < numel) ragged(i, numel - i);
    return magnitudes.finite();
  }
};

template <class Dst, class Src>
bool transfer(Dst* dst, const Src* src, std::size_t numel, double scale, bool past_caches) {
  return Transfer<Dst, Src>{dst, src, static_cast<typename Lanes<Src>::Number>(scale)}.run(numel, past_caches);
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
