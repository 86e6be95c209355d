// The CUDA part of commlab._native: addresses of a GPU's memory and a stream in, nothing kept.
#include <nanobind/nanobind.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/pack.h"
#include "cuda/pinned.h"

namespace nb = nanobind;
using namespace commlab;

namespace {

using Address = std::uintptr_t;

cuda::Table table_at(Address addresses, Address places, Address chunks, std::uint32_t chunk_count) {
  return {reinterpret_cast<const std::uint64_t*>(addresses), reinterpret_cast<const cuda::Place*>(places),
          reinterpret_cast<const cuda::Chunk*>(chunks), chunk_count};
}

cuda::Scale scale_of(float scale, Address device_scale) {
  return {scale, reinterpret_cast<const float*>(device_scale)};
}

DType wire_dtype(int dtype) {
  if (dtype < 0 || dtype > 5 || !cuda::can_pack(DType::kFloat32, static_cast<DType>(dtype)))
    throw std::invalid_argument("dtype code " + std::to_string(dtype) + " is no wire of the CUDA pack");
  return static_cast<DType>(dtype);
}

}  // namespace

void register_cuda(nb::module_& m) {
  m.attr("CUDA") = COMMLAB_CUDA;  // the compiler and the architectures
  m.attr("CUDA_CHUNK_NUMEL") = cuda::kChunkNumel;
  m.def("cuda_load", &cuda::load);
  m.def("cuda_pack", [](Address addresses, Address places, Address chunks, std::uint32_t chunk_count, Address wire,
                        int dtype, float scale, Address device_scale, Address not_finite, int device, Address stream) {
    cuda::pack(table_at(addresses, places, chunks, chunk_count), reinterpret_cast<void*>(wire), wire_dtype(dtype),
               scale_of(scale, device_scale), reinterpret_cast<std::uint32_t*>(not_finite), device,
               reinterpret_cast<void*>(stream));
  });
  m.def("cuda_unpack", [](Address addresses, Address places, Address chunks, std::uint32_t chunk_count, Address wire,
                          int dtype, float scale, Address device_scale, int device, Address stream) {
    cuda::unpack(table_at(addresses, places, chunks, chunk_count), reinterpret_cast<const void*>(wire),
                 wire_dtype(dtype), scale_of(scale, device_scale), device, reinterpret_cast<void*>(stream));
  });
  m.def("cuda_register", [](Address address, std::size_t bytes) {
    return cuda::register_host(reinterpret_cast<void*>(address), bytes);
  });
  m.def("cuda_unregister", [](Address address) { cuda::unregister_host(reinterpret_cast<void*>(address)); });
}
