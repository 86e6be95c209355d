// The descriptors of every engine of this process. A child made by fork(), such as a data loader's worker, would keep
// the connections open when this process dies, and no peer would learn of that: so the child closes them at once.
#pragma once

namespace commlab::links {

void remember(int fd);
// Before the descriptor is closed.
void forget(int fd);

}  // namespace commlab::links
