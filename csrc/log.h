// SPDX-License-Identifier: Apache-2.0
// PFA_LOG=debug: a line on stderr for everything distinct that calls take. Read once, and free
// where it is not set.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>

namespace pfa {

inline bool logs_debug() {
  static const bool kWanted = [] {
    const char* text = std::getenv("PFA_LOG");
    const std::string level = text == nullptr ? "" : text;
    if (!level.empty() && level != "debug") {
      throw std::runtime_error("PFA_LOG must be debug, got " + level);
    }
    return level == "debug";
  }();
  return kWanted;
}

// Writes a line, the first time it comes.
inline void log_once(const std::string& line) {
  static std::mutex mutex;
  static std::set<std::string> written;
  const std::lock_guard lock(mutex);
  if (written.insert(line).second) std::fprintf(stderr, "pfa: %s\n", line.c_str());
}

}  // namespace pfa
