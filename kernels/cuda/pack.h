// cpu/pack.h for memory of a GPU: many tensors to one contiguous wire and back, in one launch.
//
// The same bits as on the CPU (NaN payloads excepted): scale in fp32, no fused multiply-add, round to nearest even.
// All addresses below are the device's. Nothing here allocates, copies or waits, so a launch can be captured into a
// CUDA graph; what the graph replays then reads the tables anew.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/dtype.h"

namespace commlab::cuda {

// What one block of threads moves. A tensor has ceil(numel / kChunkNumel) of them.
constexpr std::uint32_t kChunkNumel = 4096;

// A tensor's place, in the layout of three int64: from number `start` of the wire on.
struct Place {
  std::int64_t numel;
  std::int64_t start;
  std::int64_t dtype;
};

// Numbers index * kChunkNumel .. of a tensor, in the layout of two int32.
struct Chunk {
  std::uint32_t tensor;
  std::uint32_t index;
};

// The tensors of a bucket: only `addresses` change from step to step.
struct Table {
  const std::uint64_t* addresses;
  const Place* places;
  const Chunk* chunks;
  std::uint32_t chunk_count;
};

// `device_scale`, where it is not null, is one fp32 number that takes the place of `scale`.
struct Scale {
  float scale;
  const float* device_scale;
};

// fp32, fp16 and bf16, each way.
constexpr bool can_pack(DType tensor, DType wire) {
  return (is_16bit(tensor) || tensor == DType::kFloat32) && (is_16bit(wire) || wire == DType::kFloat32);
}

// Loads the kernels into `device`, which must not happen during a capture.
void load(int device);

// Tensors -> wire. Sets *not_finite to 1 where a number written is inf or NaN, and leaves it alone where none is;
// null: does not look.
void pack(const Table& table, void* wire, DType wire_dtype, Scale scale, std::uint32_t* not_finite, int device,
          void* stream);

// Wire -> tensors.
void unpack(const Table& table, const void* wire, DType wire_dtype, Scale scale, int device, void* stream);

}  // namespace commlab::cuda
