// A program: one rank's schedule as a flat table, compiled once and run any number of times.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/dtype.h"
#include "cpu/reduce.h"

namespace commlab::links {

enum class Opcode : std::uint32_t {
  kSend = 0,    // to the peer
  kWrite = 1,   // from the peer, into the buffer
  kReduce = 2,  // from the peer, combined with what the buffer holds
  kFinish = 3,  // this rank holds everyone's contribution: divide and round, once
};

// What is done to numbers start .. stop - 1 of the buffer.
struct Row {
  Opcode opcode;
  std::uint32_t peer;  // rank of the group; of kFinish: 0
  std::size_t start, stop;
};

// Rows are taken in any order that their dependencies allow, but those of one kind with one peer in the order in which
// they stand here.
struct Program {
  std::vector<Row> rows;
  // Row r lets rows after[first[r] .. first[r + 1] - 1] go on when it is done; waits[r]: for how many rows it waits.
  std::vector<std::uint32_t> first, after, waits;
  std::size_t numel = 0;

  // Throws std::invalid_argument for a table that would read or write outside a buffer of `numel`, name a rank that is
  // not among `ranks`, or wait for a later row; counts `waits`.
  Program(std::vector<Row> rows, std::vector<std::uint32_t> first, std::vector<std::uint32_t> after, std::size_t numel,
          std::size_t ranks);
};

// The flat buffer that a program works on, and in what precision (commlab/runtime/operand.py).
struct Operand {
  char* buffer = nullptr;
  std::size_t numel = 0;
  DType dtype = DType::kFloat32;
  Op op = Op::kSum;
  double divisor = 1;          // the owner divides by it when its numbers are complete
  bool divides_first = false;  // all numbers are divided before they travel, which keeps 16-bit sums in range
  // fp32 sums of numbers own_start .. own_start + own_numel - 1 of a 16-bit buffer; null: sums stay in the buffer.
  float* wide = nullptr;
  std::size_t own_start = 0, own_numel = 0;
  bool rounds = true;  // the sums are rounded into the buffer; else they stay in `wide`, divided

  std::size_t item_bytes() const { return dtype_bytes(dtype); }
  char* at(std::size_t index) const { return buffer + index * item_bytes(); }

  // Throws std::invalid_argument where the program would add to sums that `wide` does not have.
  void require_fit(const Program& program) const;
  // Before anything travels.
  void prepare() const;
  // Combines `count` numbers that have arrived with those from `start` on.
  void reduce(std::size_t start, const char* arrived, std::size_t count) const;
  void finish(std::size_t start, std::size_t stop) const;
};

}  // namespace commlab::links
