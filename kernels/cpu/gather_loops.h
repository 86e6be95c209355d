// The loops behind gather.h. Included once per instruction set, after lanes.h and operations.h.

// One cache line of results at a time: kRows registers, all sources read side by side. More would not fit the registers
// with 16-bit types; fewer would leave a line half written when a non-temporal store wants it whole.
template <class T>
struct Line {
  static constexpr std::size_t kRows = 64 / sizeof(T) / Lanes<T>::kNumel;
  static constexpr std::size_t kNumel = 64 / sizeof(T);
};

#if LANES_BYTES == 16
template <class V>
LANES_INLINE void stream(void* to, V value) {
  write(to, value);
}
#elif LANES_BYTES == 32
template <class V>
LANES_INLINE void stream(void* to, V value) {
  if constexpr (sizeof(V) == 32)
    _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)value);
  else
    _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)value);
}
#else
template <class V>
LANES_INLINE void stream(void* to, V value) {
  if constexpr (sizeof(V) == 64)
    _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)value);
  else
    _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)value);
}
#endif

// How a register of results is laid out in memory.
template <class T>
struct Stored {
  LANES_INLINE auto of(typename Lanes<T>::Value value) { return value; }
};
template <>
struct Stored<Fp16> {
  LANES_INLINE U16 of(F32 value) { return to_fp16(value); }
};
template <>
struct Stored<Bf16> {
  LANES_INLINE U16 of(F32 value) { return to_bf16(value); }
};

template <class Dst, class Src, class Operation, class Map, bool kStream>
LANES_TARGET void gather_lines(Dst* const* dst, std::size_t destinations, const Src* const* src, std::size_t sources,
                               std::size_t numel, double factor) {
  using S = Lanes<Src>;
  constexpr std::size_t rows = Line<Src>::kRows, line = Line<Src>::kNumel;
  for (std::size_t i = 0; i < numel; i += line) {
    typename S::Value sums[rows];
    for (std::size_t row = 0; row < rows; ++row) sums[row] = S::load(src[0] + i + row * S::kNumel);
    for (std::size_t rank = 1; rank < sources; ++rank) {
      const Src* part = src[rank] + i;
#pragma GCC unroll 8
      for (std::size_t row = 0; row < rows; ++row)
        sums[row] = Operation::apply(sums[row], S::load(part + row * S::kNumel));
    }
#pragma GCC unroll 8
    for (std::size_t row = 0; row < rows; ++row) sums[row] = Map::apply(sums[row], factor);
    for (std::size_t d = 0; d < destinations; ++d) {
      Dst* to = dst[d] + i;
#pragma GCC unroll 8
      for (std::size_t row = 0; row < rows; ++row) {
        const auto stored = Stored<Dst>::of(sums[row]);
        if constexpr (kStream)
          stream(to + row * S::kNumel, stored);
        else
          write(to + row * S::kNumel, stored);
      }
    }
  }
}

template <class Dst, class Src, class Operation, class Map>
LANES_TARGET void gather_with(Dst* const* dst, std::size_t destinations, const Src* const* src, std::size_t sources,
                              std::size_t numel, double factor, bool streaming) {
  constexpr std::size_t line = Line<Src>::kNumel;
  const std::size_t whole = numel - numel % line;
  if (streaming) {
    gather_lines<Dst, Src, Operation, Map, true>(dst, destinations, src, sources, whole, factor);
#if LANES_BYTES > 16
    _mm_sfence();  // before the flag that tells the others
#endif
  } else {
    gather_lines<Dst, Src, Operation, Map, false>(dst, destinations, src, sources, whole, factor);
  }
  if (const std::size_t rest = numel - whole) {
    // The ragged end goes through the same registers from padded copies, so no result depends on where it lies.
    Src padded[kMaxRanks][line];
    Dst result[line];
    const Src* from[kMaxRanks] = {};
    for (std::size_t rank = 0; rank < sources; ++rank) {
      std::memset(static_cast<void*>(padded[rank]), 0, sizeof(padded[rank]));
      std::memcpy(padded[rank], src[rank] + whole, rest * sizeof(Src));
      from[rank] = padded[rank];
    }
    Dst* to[1] = {result};
    gather_lines<Dst, Src, Operation, Map, false>(to, 1, from, sources, line, factor);
    for (std::size_t d = 0; d < destinations; ++d) std::memcpy(dst[d] + whole, result, rest * sizeof(Dst));
  }
}

template <class Dst, class Src, class Operation>
void gather_divided(Dst* const* dst, std::size_t destinations, const Src* const* src, std::size_t sources,
                    std::size_t numel, double divisor, bool streaming) {
  if constexpr (std::is_integral_v<Src>) {
    gather_with<Dst, Src, Operation, Keep>(dst, destinations, src, sources, numel, 1, streaming);
  } else if (divisor == 1) {
    gather_with<Dst, Src, Operation, Keep>(dst, destinations, src, sources, numel, 1, streaming);
  } else if (int exponent; std::frexp(divisor, &exponent) == 0.5) {
    // A power of two: its reciprocal is exact, so the product has the quotient's bits at a fifth of its cost.
    gather_with<Dst, Src, Operation, Times>(dst, destinations, src, sources, numel, 1 / divisor, streaming);
  } else {
    gather_with<Dst, Src, Operation, Over>(dst, destinations, src, sources, numel, divisor, streaming);
  }
}

template <class Dst, class Src>
void gather_by(void* const* dst, std::size_t destinations, const void* const* src, std::size_t sources,
               std::size_t numel, Op op, double divisor, bool streaming) {
  auto* const* to = reinterpret_cast<Dst* const*>(dst);
  auto* const* from = reinterpret_cast<const Src* const*>(src);
  switch (op) {
    case Op::kSum: return gather_divided<Dst, Src, Sum>(to, destinations, from, sources, numel, divisor, streaming);
    case Op::kProd: return gather_divided<Dst, Src, Prod>(to, destinations, from, sources, numel, divisor, streaming);
    case Op::kMin: return gather_divided<Dst, Src, Min>(to, destinations, from, sources, numel, divisor, streaming);
    case Op::kMax: return gather_divided<Dst, Src, Max>(to, destinations, from, sources, numel, divisor, streaming);
  }
}

inline void gather(void* const* dst, std::size_t destinations, DType dst_dtype, const void* const* src,
                   std::size_t sources, DType dtype, std::size_t numel, Op op, double divisor, bool streaming) {
  if (dst_dtype == dtype) {
    with_any(dtype, [=](auto tag) {
      using T = typename decltype(tag)::type;
      gather_by<T, T>(dst, destinations, src, sources, numel, op, divisor, streaming);
    });
  } else {
    with_16bit(dtype, [=](auto tag) {
      using T = typename decltype(tag)::type;
      gather_by<float, T>(dst, destinations, src, sources, numel, op, divisor, streaming);
    });
  }
}
