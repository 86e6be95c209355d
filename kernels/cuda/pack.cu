#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/move.cuh"
#include "cuda/pack.h"

namespace commlab::cuda {
namespace {

template <class Wire>
__global__ void __launch_bounds__(kThreads)
    move_chunks(Table table, Wire* wire, Scale scale, std::uint32_t* not_finite, bool packs) {
  move_chunk(table, wire, scale, not_finite, packs, blockIdx.x, threadIdx.x);
}

void check(cudaError_t code, const char* what) {
  if (code != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorName(code) + ", " +
                             cudaGetErrorString(code));
}

// The caller's device is the current one again afterwards.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "which device is current");
    if (before_ != device) check(cudaSetDevice(device), "choosing a device");
    changed_ = before_ != device;
  }
  ~OnDevice() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <class Wire>
void launch(const Table& table, void* wire, Scale scale, std::uint32_t* not_finite, bool packs, cudaStream_t stream) {
  move_chunks<<<table.chunk_count, kThreads, 0, stream>>>(table, static_cast<Wire*>(wire), scale, not_finite, packs);
  check(cudaGetLastError(), packs ? "launch of pack" : "launch of unpack");
}

void run(const Table& table, void* wire, DType wire_dtype, Scale scale, std::uint32_t* not_finite, bool packs,
         int device, void* stream) {
  if (table.chunk_count == 0) return;
  const OnDevice here(device);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (wire_dtype) {
    case DType::kFloat16: return launch<__half>(table, wire, scale, not_finite, packs, on);
    case DType::kBFloat16: return launch<__nv_bfloat16>(table, wire, scale, not_finite, packs, on);
    default: return launch<float>(table, wire, scale, not_finite, packs, on);
  }
}

}  // namespace

void load(int device) {
  const OnDevice here(device);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, move_chunks<float>), "loading the kernel for fp32");
  check(cudaFuncGetAttributes(&attributes, move_chunks<__half>), "loading the kernel for fp16");
  check(cudaFuncGetAttributes(&attributes, move_chunks<__nv_bfloat16>), "loading the kernel for bf16");
}

void pack(const Table& table, void* wire, DType wire_dtype, Scale scale, std::uint32_t* not_finite, int device,
          void* stream) {
  run(table, wire, wire_dtype, scale, not_finite, true, device, stream);
}

void unpack(const Table& table, const void* wire, DType wire_dtype, Scale scale, int device, void* stream) {
  run(table, const_cast<void*>(wire), wire_dtype, scale, nullptr, false, device, stream);
}

}  // namespace commlab::cuda
