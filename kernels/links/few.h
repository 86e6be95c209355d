// Sums of few numbers: of all ranks in rank order, or, where a node's ranks add up first, node by node.
#pragma once

#include <cstddef>
#include <vector>

#include "cpu/dtype.h"
#include "cpu/reduce.h"

namespace commlab::links {

// In what a node's sums are kept, and travel: 16-bit numbers are rounded once, at the end.
constexpr DType sums_dtype(DType dtype) { return is_16bit(dtype) ? DType::kFloat32 : dtype; }

// Of one node: sums[i] = rows[0][i] OP rows[1][i] ..., in sums_dtype.
void add_node(void* sums, const std::vector<const void*>& rows, DType dtype, std::size_t numel, Op op);
// Of all nodes: to[i] = round((sums[0][i] OP sums[1][i] ...) / divisor). `to` is none of the sums.
void add_nodes(void* to, const std::vector<const void*>& sums, DType dtype, std::size_t numel, Op op, double divisor);

// All at once: the bits of add_node for each node, and add_nodes. `rows`: of each rank; `to` may be one of them.
// `nodes`: the ranks of each node; none: all ranks are added in their order.
void add_ranks(void* to, const std::vector<const void*>& rows, const std::vector<std::vector<std::size_t>>& nodes,
               DType dtype, std::size_t numel, Op op, double divisor);

}  // namespace commlab::links
