// What a tensor is, without asking Python: as much of DLPack 1 (https://dmlc.github.io/dlpack) as is read here.
#pragma once

#include <cstdint>

namespace commlab {

constexpr std::int32_t kDLCPU = 1;

struct DLDataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

struct DLTensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t *shape, *strides;  // counted in numbers; both the tensor's own
  std::uint64_t byte_offset;
};

// Fills in `out` for a Python tensor, which owns all of it; 0, or -1 with a Python error.
using DLTensorFrom = int (*)(void* tensor, DLTensor* out);

// What the capsule `__dlpack_c_exchange_api__` of a tensor's class has.
struct DLExchange {
  std::uint32_t major, minor;
  DLExchange* previous;
  void *allocator, *managed_from, *managed_to;
  DLTensorFrom tensor_from;
  void* current_stream;
};

}  // namespace commlab
