// The kernel of the pack, as functions of block and thread: no thread waits for another, so that the host can run them
// one after the other, which is how they are tested where there is no GPU (tests/cuda_on_host.cu).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <limits>

#include "cuda/pack.h"

namespace commlab::cuda {

constexpr std::uint32_t kThreads = 256;

// Several numbers that are read or written by one instruction.
template <class T, int kNumel>
struct alignas(sizeof(T) * kNumel) Several {
  T numbers[kNumel];
};

__host__ __device__ inline float widened(float x) { return x; }
__host__ __device__ inline float widened(__half x) { return __half2float(x); }
__host__ __device__ inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

__host__ __device__ inline void narrow(float& to, float x) { to = x; }
__host__ __device__ inline void narrow(__half& to, float x) { to = __float2half_rn(x); }
__host__ __device__ inline void narrow(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// The least magnitude that the cast makes inf of: half way between the largest number and the one that would follow,
// because such a tie goes to the even one, which is inf.
constexpr float kInfinity = std::numeric_limits<float>::infinity();
__host__ __device__ inline float overflow_from(float) { return kInfinity; }
__host__ __device__ inline float overflow_from(__half) { return 65520.0f; }
__host__ __device__ inline float overflow_from(__nv_bfloat16) { return 0x1.ffp127f; }

// Whether to's number is inf or NaN.
template <class Dst, class Src>
__host__ __device__ bool cast(Dst& to, Src from, float scale) {
  const float scaled = widened(from) * scale;  // nothing is added, so nothing is fused
  narrow(to, scaled);
  return !(fabsf(scaled) < overflow_from(to));
}

template <class T>
__host__ __device__ std::uint32_t numbers_beyond(const T* address, std::uint32_t alignment) {
  return static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(address) % alignment / sizeof(T));
}

// What one thread of a block has to do for dst = cast(src * scale); whether any of its numbers is not finite. The wider
// of the two types is moved 16 bytes at a time where both can be aligned at once, the other as many numbers at a time.
// Neighbouring threads move neighbouring memory, and a thread has all its reads under way before its first write.
template <class Dst, class Src>
__host__ __device__ bool transfer(Dst* dst, const Src* src, std::uint32_t numel, float scale, std::uint32_t thread) {
  constexpr int kGroup = 16 / (sizeof(Dst) > sizeof(Src) ? sizeof(Dst) : sizeof(Src));
  constexpr int kTurns = kChunkNumel / (kThreads * kGroup);
  bool bad = false;

  const std::uint32_t beyond = numbers_beyond(dst, kGroup * sizeof(Dst));
  if (beyond != numbers_beyond(src, kGroup * sizeof(Src))) {
    for (std::uint32_t start = thread; start < numel; start += kGroup * kThreads) {
      Src read[kGroup];
#pragma unroll
      for (int k = 0; k < kGroup; ++k)
        if (start + k * kThreads < numel) read[k] = src[start + k * kThreads];
#pragma unroll
      for (int k = 0; k < kGroup; ++k)
        if (start + k * kThreads < numel) bad |= cast(dst[start + k * kThreads], read[k], scale);
    }
    return bad;
  }

  const std::uint32_t to_border = beyond == 0 ? 0 : kGroup - beyond;
  const std::uint32_t head = numel < to_border ? numel : to_border;
  const std::uint32_t groups = (numel - head) / kGroup;
  const auto* from = reinterpret_cast<const Several<Src, kGroup>*>(src + head);
  auto* to = reinterpret_cast<Several<Dst, kGroup>*>(dst + head);
  Several<Src, kGroup> read[kTurns];
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const std::uint32_t group = turn * kThreads + thread;
    if (group < groups) read[turn] = from[group];
  }
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const std::uint32_t group = turn * kThreads + thread;
    if (group < groups) {
      Several<Dst, kGroup> written;
#pragma unroll
      for (int k = 0; k < kGroup; ++k) bad |= cast(written.numbers[k], read[turn].numbers[k], scale);
      to[group] = written;
    }
  }

  if (thread < head) bad |= cast(dst[thread], src[thread], scale);
  const std::uint32_t last = head + groups * kGroup + thread;
  if (last < numel) bad |= cast(dst[last], src[last], scale);
  return bad;
}

template <class Tensor, class Wire>
__host__ __device__ bool move(Tensor* tensor, Wire* wire, std::uint32_t numel, float scale, bool packs,
                              std::uint32_t thread) {
  return packs ? transfer(wire, tensor, numel, scale, thread) : transfer(tensor, wire, numel, scale, thread);
}

// One block, one chunk. The tensor's dtype and the direction are the same for all threads of a block.
template <class Wire>
__host__ __device__ void move_chunk(const Table& table, Wire* wire, Scale given, std::uint32_t* not_finite, bool packs,
                                    std::uint32_t block, std::uint32_t thread) {
  const Chunk chunk = table.chunks[block];
  const Place place = table.places[chunk.tensor];
  const std::int64_t first = static_cast<std::int64_t>(chunk.index) * kChunkNumel;
  const auto numel = static_cast<std::uint32_t>(
      place.numel - first < kChunkNumel ? place.numel - first : static_cast<std::int64_t>(kChunkNumel));
  const std::uint64_t address = table.addresses[chunk.tensor];
  Wire* there = wire + place.start + first;
  const float scale = given.device_scale != nullptr ? *given.device_scale : given.scale;
  bool bad;
  switch (static_cast<DType>(place.dtype)) {
    case DType::kFloat16:
      bad = move(reinterpret_cast<__half*>(address) + first, there, numel, scale, packs, thread);
      break;
    case DType::kBFloat16:
      bad = move(reinterpret_cast<__nv_bfloat16*>(address) + first, there, numel, scale, packs, thread);
      break;
    default: bad = move(reinterpret_cast<float*>(address) + first, there, numel, scale, packs, thread);
  }
  // Whoever finds one writes the same.
  if (bad && not_finite != nullptr) *not_finite = 1;
}

}  // namespace commlab::cuda
