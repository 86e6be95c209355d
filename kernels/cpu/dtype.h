// 16-bit numbers as they lie in memory, and the bridge from a dtype known at run time to a C++ type.
#pragma once

#include <cstddef>
#include <cstdint>

namespace commlab {

enum class DType : int {
  kFloat32 = 0,
  kFloat64 = 1,
  kFloat16 = 2,
  kBFloat16 = 3,
  kInt32 = 4,
  kInt64 = 5,
  kByte = 6,  // moved, whatever it means, and never computed with
};

struct Fp16 {
  std::uint16_t bits;
};
struct Bf16 {
  std::uint16_t bits;
};
// An fp64 that is rounded to fp32 before anything is done with it.
struct Fp64InFp32 {
  double number;
};

template <class T>
struct Tag {
  using type = T;
};

// Calls fn(Tag<T>) with the T that dtype stands for.
template <class Fn>
void with_16bit(DType dtype, Fn fn) {
  dtype == DType::kFloat16 ? fn(Tag<Fp16>{}) : fn(Tag<Bf16>{});
}

template <class Fn>
void with_float(DType dtype, Fn fn) {
  switch (dtype) {
    case DType::kFloat32: return fn(Tag<float>{});
    case DType::kFloat64: return fn(Tag<double>{});
    default: return with_16bit(dtype, fn);
  }
}

template <class Fn>
void with_any(DType dtype, Fn fn) {
  switch (dtype) {
    case DType::kInt32: return fn(Tag<std::int32_t>{});
    case DType::kInt64: return fn(Tag<std::int64_t>{});
    default: return with_float(dtype, fn);
  }
}

constexpr std::size_t dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::kByte: return 1;
    case DType::kFloat16:
    case DType::kBFloat16: return 2;
    case DType::kFloat32:
    case DType::kInt32: return 4;
    default: return 8;
  }
}

constexpr bool is_16bit(DType dtype) { return dtype_bytes(dtype) == 2; }
constexpr bool is_float(DType dtype) {
  return dtype != DType::kInt32 && dtype != DType::kInt64 && dtype != DType::kByte;
}

}  // namespace commlab
