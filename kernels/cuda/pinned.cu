#include <cuda_runtime.h>

#include "cuda/pinned.h"

namespace commlab::cuda {

// A refusal is an answer here: it must not be found later, as the last error, by whoever launches a kernel.
bool register_host(void* address, std::size_t bytes) {
  const bool registered = cudaHostRegister(address, bytes, cudaHostRegisterPortable) == cudaSuccess;
  if (!registered) (void)cudaGetLastError();
  return registered;
}

void unregister_host(void* address) {
  if (cudaHostUnregister(address) != cudaSuccess) (void)cudaGetLastError();
}

}  // namespace commlab::cuda
