// Keeps the memory of a process that is killed until its connections are closed, so that its peers learn of its death
// at once.
//
// The kernel ends a process in this order: it takes the memory down, which for torch and some GB of tensors takes
// hundreds of milliseconds; then it closes the descriptors; then the parent is told. Memory that another process uses
// too only loses one user. The keeper is such a process: it shares this one's memory, has no descriptor but the two
// that tell it of this one's end, sleeps, and ends after it. What remains to be taken down is taken down there.
//
//   - It is a child that neither sends SIGCHLD nor is found by wait(): only __WCLONE finds it.
//   - It is a session of its own: what a terminal or a launcher sends to the process group does not reach it.
//   - It runs nothing but system calls, on a stack of its own: it has neither a libc nor thread-local memory.
//   - It ends with this process, with exec (its end of the pipe closes then), and with the Keeper.
//   - A forked child has nothing to do with it.
#pragma once

#include <sys/types.h>

#include <memory>

namespace commlab::links {

class Keeper {
 public:
  // The keeper of this process, one for all engines; nullptr where the system does not allow one.
  static std::shared_ptr<Keeper> of_this_process();
  ~Keeper();
  Keeper(const Keeper&) = delete;
  Keeper& operator=(const Keeper&) = delete;

  // 0 in a forked child, whose parent's it is.
  pid_t pid() const;

 private:
  Keeper() = default;
  bool start();

  pid_t owner_ = 0, pid_ = 0;
  int end_ = -1;  // the end of the pipe that only this process holds
  void* stack_ = nullptr;
};

}  // namespace commlab::links
