// Host memory that a GPU can copy from and to at full speed.
#pragma once

#include <cstddef>

namespace commlab::cuda {

// Whether the memory is registered now, for all devices. Whole pages count; what is registered already is refused.
bool register_host(void* address, std::size_t bytes);

void unregister_host(void* address);

}  // namespace commlab::cuda
