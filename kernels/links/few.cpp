#include "few.h"

#include "cpu/gather.h"

namespace commlab::links {

void add_node(void* sums, const std::vector<const void*>& rows, DType dtype, std::size_t numel, Op op) {
  gather_reduce(&sums, 1, sums_dtype(dtype), rows.data(), rows.size(), dtype, numel, op, 1, /*cached=*/true);
}

void add_nodes(void* to, const std::vector<const void*>& sums, DType dtype, std::size_t numel, Op op, double divisor) {
  const DType wide = sums_dtype(dtype);
  if (wide == dtype) {
    gather_reduce(&to, 1, dtype, sums.data(), sums.size(), dtype, numel, op, divisor, /*cached=*/true);
    return;
  }
  std::vector<float> total(numel);
  void* into = total.data();
  gather_reduce(&into, 1, wide, sums.data(), sums.size(), wide, numel, op, 1, /*cached=*/true);
  reduce_loops().narrow(to, total.data(), numel, dtype, static_cast<float>(divisor));
}

void add_ranks(void* to, const std::vector<const void*>& rows, const std::vector<std::vector<std::size_t>>& nodes,
               DType dtype, std::size_t numel, Op op, double divisor) {
  if (nodes.empty()) {
    gather_reduce(&to, 1, dtype, rows.data(), rows.size(), dtype, numel, op, divisor, /*cached=*/true);
    return;
  }
  const std::size_t bytes = numel * dtype_bytes(sums_dtype(dtype));
  std::vector<char> scratch(nodes.size() * bytes);
  std::vector<const void*> sums;
  for (const std::vector<std::size_t>& node : nodes) {
    std::vector<const void*> members;
    for (const std::size_t rank : node) members.push_back(rows[rank]);
    char* into = scratch.data() + sums.size() * bytes;
    add_node(into, members, dtype, numel, op);
    sums.push_back(into);
  }
  add_nodes(to, sums, dtype, numel, op, divisor);
}

}  // namespace commlab::links
