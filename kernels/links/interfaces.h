// The addresses under which this host may be reached.
#pragma once

#include <string>
#include <vector>

namespace commlab::links {

struct Interface {
  std::string name;
  std::string address;  // IPv4, or IPv6 with its scope where it has one
  bool loopback;
};

// Of all interfaces that are up, in the system's order.
std::vector<Interface> interfaces();

}  // namespace commlab::links
