// The two loops behind every function of reduce.h. Included once per instruction set, as lanes.h tells.
#include "lanes.h"
#include "operations.h"

// dst = dst OP src, register by register. The ragged end goes through the same registers from a padded
// copy, so a number's result never depends on where in the range it lies.
template <class Dst, class Src, class Operation>
LANES_TARGET void combine(Dst* dst, const Src* src, std::size_t numel) {
  using D = Lanes<Dst>;
  using S = Lanes<Src>;
  static_assert(D::kNumel == S::kNumel);
  std::size_t i = 0;
#pragma GCC unroll 4
  for (; i + D::kNumel <= numel; i += D::kNumel)
    D::store(dst + i, Operation::apply(D::load(dst + i), S::load(src + i)));
  if (const std::size_t rest = numel - i) {
    Dst d[D::kNumel] = {};
    Src s[S::kNumel] = {};
    std::memcpy(d, dst + i, rest * sizeof(Dst));
    std::memcpy(s, src + i, rest * sizeof(Src));
    D::store(d, Operation::apply(D::load(d), S::load(s)));
    std::memcpy(dst + i, d, rest * sizeof(Dst));
  }
}

// dst = MAP(src, factor)
template <class Dst, class Src, class Map>
LANES_TARGET void convert(Dst* dst, const Src* src, std::size_t numel, double factor) {
  using D = Lanes<Dst>;
  using S = Lanes<Src>;
  static_assert(D::kNumel == S::kNumel);
  std::size_t i = 0;
#pragma GCC unroll 4
  for (; i + D::kNumel <= numel; i += D::kNumel) D::store(dst + i, Map::apply(S::load(src + i), factor));
  if (const std::size_t rest = numel - i) {
    Dst d[D::kNumel] = {};
    Src s[S::kNumel] = {};
    std::memcpy(s, src + i, rest * sizeof(Src));
    D::store(d, Map::apply(S::load(s), factor));
    std::memcpy(dst + i, d, rest * sizeof(Dst));
  }
}

template <class Dst, class Src>
void combine_by(Dst* dst, const Src* src, std::size_t numel, Op op) {
  switch (op) {
    case Op::kSum: return combine<Dst, Src, Sum>(dst, src, numel);
    case Op::kProd: return combine<Dst, Src, Prod>(dst, src, numel);
    case Op::kMin: return combine<Dst, Src, Min>(dst, src, numel);
    case Op::kMax: return combine<Dst, Src, Max>(dst, src, numel);
  }
}

inline void reduce(void* dst, const void* src, std::size_t numel, DType dtype, Op op) {
  with_any(dtype, [=](auto tag) {
    using T = typename decltype(tag)::type;
    combine_by(static_cast<T*>(dst), static_cast<const T*>(src), numel, op);
  });
}

inline void accumulate(float* dst, const void* src, std::size_t numel, DType dtype16, Op op) {
  with_16bit(dtype16,
             [=](auto tag) { combine_by(dst, static_cast<const typename decltype(tag)::type*>(src), numel, op); });
}

inline void widen(float* dst, const void* src, std::size_t numel, DType dtype16) {
  with_16bit(dtype16, [=](auto tag) {
    using T = typename decltype(tag)::type;
    convert<float, T, Keep>(dst, static_cast<const T*>(src), numel, 1.0);
  });
}

inline void narrow(void* dst, const float* src, std::size_t numel, DType dtype16, float divisor) {
  with_16bit(dtype16, [=](auto tag) {
    using T = typename decltype(tag)::type;
    // x / 1 is x; a division costs as much as the rest of the loop.
    if (divisor == 1.0f) return convert<T, float, Keep>(static_cast<T*>(dst), src, numel, 1.0);
    convert<T, float, Over>(static_cast<T*>(dst), src, numel, divisor);
  });
}

inline void scale(void* dst, std::size_t numel, DType dtype, double factor) {
  with_float(dtype, [=](auto tag) {
    using T = typename decltype(tag)::type;
    convert<T, T, Times>(static_cast<T*>(dst), static_cast<const T*>(dst), numel, factor);
  });
}

inline void divide(void* dst, std::size_t numel, DType dtype, double divisor) {
  with_float(dtype, [=](auto tag) {
    using T = typename decltype(tag)::type;
    convert<T, T, Over>(static_cast<T*>(dst), static_cast<const T*>(dst), numel, divisor);
  });
}

// 64 sums side by side, whatever the registers' width: the same order of additions on every instruction set.
constexpr std::size_t kRow = 64, kRowRegisters = kRow / Lanes<float>::kNumel;

LANES_INLINE void add_squares(F32* sums, const float* from) {
#pragma GCC unroll 16
  for (std::size_t r = 0; r < kRowRegisters; ++r) {
    const F32 x = Lanes<float>::load(from + r * Lanes<float>::kNumel);
    sums[r] += x * x;
  }
}

LANES_TARGET inline double squares(const float* src, std::size_t numel) {
  F32 sums[kRowRegisters] = {};
  std::size_t i = 0;
  for (; i + kRow <= numel; i += kRow) add_squares(sums, src + i);
  if (i < numel) {
    float padded[kRow] = {};
    std::memcpy(padded, src + i, (numel - i) * sizeof(float));
    add_squares(sums, padded);
  }
  float parts[kRow];
  std::memcpy(parts, sums, sizeof(parts));
  double total = 0;
  for (const float part : parts) total += part;
  return total;
}

constexpr ReduceLoops kReduceLoops{reduce, accumulate, widen, narrow, scale, divide, squares};

#include "lanes_end.h"
