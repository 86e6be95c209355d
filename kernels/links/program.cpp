#include "program.h"

#include <stdexcept>
#include <utility>

namespace commlab::links {

Program::Program(std::vector<Row> table, std::vector<std::uint32_t> begins, std::vector<std::uint32_t> follows,
                 std::size_t length, std::size_t ranks)
    : rows(std::move(table)),
      first(std::move(begins)),
      after(std::move(follows)),
      waits(rows.size(), 0),
      numel(length) {
  const std::size_t count = rows.size();
  if (count >= 0xffffffffu || first.size() != count + 1 || first.front() != 0 || first.back() != after.size())
    throw std::invalid_argument("a program needs a list of what follows for each row");
  for (std::size_t row = 0; row < count; ++row) {
    const Row& each = rows[row];
    if (static_cast<std::uint32_t>(each.opcode) > 3) throw std::invalid_argument("unknown opcode");
    if (each.peer >= ranks) throw std::invalid_argument("a row names a rank that the group does not have");
    if (each.start >= each.stop || each.stop > numel) throw std::invalid_argument("a row reaches outside its buffer");
    if (first[row] > first[row + 1] || first[row + 1] > after.size())
      throw std::invalid_argument("the lists of what follows overlap");
    for (std::size_t at = first[row]; at < first[row + 1]; ++at) {
      if (after[at] <= row || after[at] >= count) throw std::invalid_argument("a row waits for itself or a later one");
      ++waits[after[at]];
    }
  }
}

void Operand::require_fit(const Program& program) const {
  if (program.numel != numel) throw std::invalid_argument("the program is for a buffer of another length");
  if (own_start + own_numel > numel || (wide && !is_16bit(dtype)))
    throw std::invalid_argument("the sums of 16-bit numbers lie outside the buffer");
  for (const Row& row : program.rows) {
    if (dtype == DType::kByte && row.opcode == Opcode::kReduce)
      throw std::invalid_argument("bytes are moved, and not computed with");
    if (wide && (row.opcode == Opcode::kReduce || row.opcode == Opcode::kFinish) &&
        (row.start < own_start || row.stop > own_start + own_numel))
      throw std::invalid_argument("a row adds to sums that are not this rank's own");
  }
}

void Operand::prepare() const {
  if (wide) reduce_loops().widen(wide, at(own_start), own_numel, dtype);
  if (divides_first) reduce_loops().divide(buffer, numel, dtype, divisor);
}

void Operand::reduce(std::size_t start, const char* arrived, std::size_t count) const {
  if (wide)
    reduce_loops().accumulate(wide + (start - own_start), arrived, count, dtype, op);
  else
    reduce_loops().reduce(at(start), arrived, count, dtype, op);
}

void Operand::finish(std::size_t start, std::size_t stop) const {
  if (divides_first) return;
  if (wide && rounds)
    reduce_loops().narrow(at(start), wide + (start - own_start), stop - start, dtype, static_cast<float>(divisor));
  else if (wide && divisor != 1)
    reduce_loops().divide(wide + (start - own_start), stop - start, DType::kFloat32, divisor);
  else if (divisor != 1)
    reduce_loops().divide(at(start), stop - start, dtype, divisor);
}

}  // namespace commlab::links
