// How a register full of numbers is read, computed and written.
//
// Included once per instruction set, inside that set's namespace (hence no include guard). The includer defines
//   LANES_TARGET  the function attribute that switches the instruction set on
//   LANES_BYTES   the width of a register: 16, 32 or 64
// Arithmetic is written with the compiler's vector types, so it reads once for all sets and all dtypes;
// every function carries the attribute itself, because inlining never crosses it.

#define LANES_INLINE LANES_TARGET __attribute__((always_inline)) static inline

using F32 = float __attribute__((vector_size(LANES_BYTES)));
using F64 = double __attribute__((vector_size(LANES_BYTES)));
using U32 = std::uint32_t __attribute__((vector_size(LANES_BYTES)));
using I32 = std::int32_t __attribute__((vector_size(LANES_BYTES)));
using I64 = std::int64_t __attribute__((vector_size(LANES_BYTES)));
// As many numbers as an F32 holds, each half or twice as wide.
using U16 = std::uint16_t __attribute__((vector_size(LANES_BYTES / 2)));
using I16 = std::int16_t __attribute__((vector_size(LANES_BYTES / 2)));
using F64x2 = double __attribute__((vector_size(LANES_BYTES * 2)));
using I64x2 = std::int64_t __attribute__((vector_size(LANES_BYTES * 2)));

template <class To>
LANES_INLINE To read(const void* from) {
  To to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

template <class From>
LANES_INLINE void write(void* to, From from) {
  std::memcpy(to, &from, sizeof(from));
}

#if LANES_BYTES == 16  // no conversion instructions: fp16 by hand

LANES_INLINE F32 from_fp16(U16 half) {
  const U32 h = __builtin_convertvector(half, U32);
  const U32 sign = (h & 0x8000u) << 16;
  const U32 magnitude = h & 0x7fffu;
  const U32 normal = (magnitude << 13) + (112u << 23);
  // 0x7c00 and above are inf and NaN: the exponent becomes all ones.
  const U32 special = (magnitude << 13) | 0x7f800000u;
  // Below 0x0400 the number is magnitude * 2^-24. Going through an integer keeps it exact even
  // where the processor was told to flush fp32 subnormals.
  const U32 subnormal = (U32)(__builtin_convertvector((I32)magnitude, F32) * 0x1p-24f);
  const U32 finite = magnitude < 0x0400u ? subnormal : normal;
  return (F32)(sign | (magnitude >= 0x7c00u ? special : finite));
}

LANES_INLINE U16 to_fp16(F32 x) {
  const U32 sign = ((U32)x >> 16) & 0x8000u;
  const U32 magnitude = (U32)x & 0x7fffffffu;
  // Nearest even: half a unit less one, plus the last kept bit. A carry runs into the exponent, and
  // from 65520 on into 0x7c00, which is inf: as it should be.
  const U32 rebased = magnitude - (112u << 23);
  const U32 normal = (rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13;
  // Below 2^-14 the unit is 2^-24, that of fp32 just above 0.5: the addition itself rounds.
  const U32 subnormal = (U32)((F32)magnitude + 0.5f) - 0x3f000000u;
  const U32 finite = magnitude < 0x38800000u ? subnormal : normal;
  const U32 inf_or_nan = magnitude > 0x7f800000u ? (U32){} + 0x7e00u : (U32){} + 0x7c00u;
  return __builtin_convertvector(sign | (magnitude >= 0x47800000u ? inf_or_nan : finite), U16);
}

#elif LANES_BYTES == 32

LANES_INLINE F32 from_fp16(U16 half) { return (F32)_mm256_cvtph_ps((__m128i)half); }
LANES_INLINE U16 to_fp16(F32 x) { return (U16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }

#elif LANES_BYTES == 64

// The zero-masked forms with a full mask: the same instruction, without GCC's false warning on the plain ones.
LANES_INLINE F32 from_fp16(U16 half) { return (F32)_mm512_maskz_cvtph_ps(0xffff, (__m256i)half); }
LANES_INLINE U16 to_fp16(F32 x) { return (U16)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT); }

#endif

// The numbers as 16 bits each; they fit.
LANES_INLINE U16 halved(U32 x) {
#if LANES_BYTES == 32  // one instruction less than GCC's own, and bf16 needs every one
  const __m256i v = (__m256i)x;
  return (U16)_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
#else
  return __builtin_convertvector(x, U16);
#endif
}

// A bfloat16 is the upper half of an fp32.
LANES_INLINE F32 from_bf16(U16 upper) { return (F32)(__builtin_convertvector(upper, U32) << 16); }

LANES_INLINE U16 to_bf16(F32 x) {
  const U32 u = (U32)x;
  const U32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return halved(x != x ? (U32){} + 0x7fc0u : rounded);
}

// Lanes<T>: kNumel numbers of type T in memory, Value in a register while computing, and Bits, integers that
// show a Value as it will lie in memory. load and store go between memory and Value, encode from Value to Bits.
template <class T>
struct Lanes;

template <class T, class Register, class Integers>
struct PlainLanes {
  using Number = T;
  using Value = Register;
  using Bits = Integers;
  static constexpr std::size_t kNumel = sizeof(Register) / sizeof(T);
  LANES_INLINE Value load(const T* from) { return read<Register>(from); }
  LANES_INLINE Bits encode(Value value) { return (Bits)value; }
  LANES_INLINE void store(T* to, Value value) { write(to, value); }
};

template <>
struct Lanes<float> : PlainLanes<float, F32, I32> {};
template <>
struct Lanes<double> : PlainLanes<double, F64, I64> {};
template <>
struct Lanes<std::int32_t> : PlainLanes<std::int32_t, I32, I32> {};
template <>
struct Lanes<std::int64_t> : PlainLanes<std::int64_t, I64, I64> {};

template <>
struct Lanes<Fp16> {
  using Number = float;
  using Value = F32;
  using Bits = I16;
  static constexpr std::size_t kNumel = LANES_BYTES / 4;
  LANES_INLINE Value load(const Fp16* from) { return from_fp16(read<U16>(from)); }
  LANES_INLINE Bits encode(Value value) { return (Bits)to_fp16(value); }
  LANES_INLINE void store(Fp16* to, Value value) { write(to, to_fp16(value)); }
};

template <>
struct Lanes<Bf16> {
  using Number = float;
  using Value = F32;
  using Bits = I16;
  static constexpr std::size_t kNumel = LANES_BYTES / 4;
  LANES_INLINE Value load(const Bf16* from) { return from_bf16(read<U16>(from)); }
  LANES_INLINE Bits encode(Value value) { return (Bits)to_bf16(value); }
  LANES_INLINE void store(Bf16* to, Value value) { write(to, to_bf16(value)); }
};

// fp64 in memory, computed in fp32: how a wire of fewer bits sees it.
template <>
struct Lanes<Fp64InFp32> {
  using Number = float;
  using Value = F32;
  using Bits = I64x2;
  static constexpr std::size_t kNumel = LANES_BYTES / 4;
  LANES_INLINE Value load(const Fp64InFp32* from) { return __builtin_convertvector(read<F64x2>(from), F32); }
  LANES_INLINE Bits encode(Value value) { return (Bits) __builtin_convertvector(value, F64x2); }
  LANES_INLINE void store(Fp64InFp32* to, Value value) { write(to, encode(value)); }
};
