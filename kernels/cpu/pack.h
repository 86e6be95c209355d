// Many tensors to one contiguous wire and back, in one pass: read, scale, cast, write, look for inf and NaN.
//
// The scale is applied in fp32 and the cast rounds to nearest even, so the bits are those of
// tensor.float() * scale cast to the wire's dtype (NaN payloads excepted). fp64 is rounded to fp32 first,
// unless the wire is fp64 too.
#pragma once

#include <cstddef>

#include "dtype.h"

namespace commlab {

// One tensor's place: numel numbers of its own dtype at address, from number start of the wire on.
struct Piece {
  void* address;
  std::size_t numel;
  std::size_t start;
  DType dtype;
};

// fp32, fp16 and bf16 wires carry every float; an fp64 wire carries fp64.
bool can_pack(DType tensor, DType wire);

// Tensors -> wire. Returns whether every number written is finite: false for inf or NaN in a tensor and for
// what overflowed on the way.
bool pack(const Piece* pieces, std::size_t count, void* wire, DType wire_dtype, double scale);

// Wire -> tensors, each number times scale.
void unpack(const Piece* pieces, std::size_t count, const void* wire, DType wire_dtype, double scale);

}  // namespace commlab
