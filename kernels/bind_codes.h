// The codes by which Python names dtypes and operations.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/dtype.h"
#include "cpu/reduce.h"

namespace commlab {

using Address = std::uintptr_t;

inline DType dtype_of(int code) {
  if (code < 0 || code > 5) throw std::invalid_argument("dtype code " + std::to_string(code) + " is not one of 0..5");
  return static_cast<DType>(code);
}

// Of data that are only moved.
inline DType moved_dtype_of(int code) { return code == static_cast<int>(DType::kByte) ? DType::kByte : dtype_of(code); }

inline Op op_of(int code) {
  if (code < 0 || code > 3) throw std::invalid_argument("op code " + std::to_string(code) + " is not one of 0..3");
  return static_cast<Op>(code);
}

}  // namespace commlab
