// A program whose lines are read while it runs.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace pykd::runtime {

// Found on the PATH; reads nothing, and its errors are not shown. It ends with this object at the latest.
class Process {
 public:
  explicit Process(const std::vector<std::string>& words);  // throws std::system_error where there is no such program
  ~Process();
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  // The next line, without its end; nothing where none comes within so many seconds, or ever: ended(). Of one that is
  // longer than 64 KiB the rest is left out.
  std::optional<std::string> line(double seconds);
  bool ended() const { return ended_; }

 private:
  int pid_ = -1, output_ = -1;
  bool ended_ = false, skipping_ = false;
  std::string held_;  // what was read behind the last line
};

}  // namespace pykd::runtime
