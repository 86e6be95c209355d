// Which instruction set the loops run on: chosen once from what the processor has, or forced (by tests).
#pragma once

#include <vector>

namespace commlab {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

Isa isa();
// False, and nothing changes, where the processor lacks it.
bool set_isa(Isa isa);
bool has_isa(Isa isa);
const char* isa_name(Isa isa);

}  // namespace commlab
