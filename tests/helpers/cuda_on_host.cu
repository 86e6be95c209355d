// The CUDA kernel of the pack, run by the host: every block and every thread, one after the other.
#include "cuda/move.cuh"

using namespace commlab;

namespace {

template <class Wire>
void run(const cuda::Table& table, void* wire, float scale, std::uint32_t* not_finite, bool packs) {
  for (std::uint32_t block = 0; block < table.chunk_count; ++block)
    for (std::uint32_t thread = 0; thread < cuda::kThreads; ++thread)
      cuda::move_chunk(table, static_cast<Wire*>(wire), cuda::Scale{0.0f, &scale}, not_finite, packs, block, thread);
}

}  // namespace

extern "C" std::uint32_t chunk_numel() { return cuda::kChunkNumel; }

extern "C" void move_all(const std::uint64_t* addresses, const void* places, const void* chunks, std::uint32_t count,
                         void* wire, int wire_dtype, float scale, std::uint32_t* not_finite, bool packs) {
  const cuda::Table table{addresses, static_cast<const cuda::Place*>(places), static_cast<const cuda::Chunk*>(chunks),
                          count};
  switch (static_cast<DType>(wire_dtype)) {
    case DType::kFloat16: return run<__half>(table, wire, scale, not_finite, packs);
    case DType::kBFloat16: return run<__nv_bfloat16>(table, wire, scale, not_finite, packs);
    default: return run<float>(table, wire, scale, not_finite, packs);
  }
}
