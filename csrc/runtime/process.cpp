#include "runtime/process.h"

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <system_error>
#include <thread>
#include <utility>

extern char** environ;

namespace pykd::runtime {
namespace {

constexpr size_t kLongestLine = 64 << 10;

using Clock = std::chrono::steady_clock;

}  // namespace

Process::Process(const std::vector<std::string>& words) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC)) throw std::system_error(errno, std::generic_category(), words[0]);
  output_ = ends[0];
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
  posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
  std::vector<std::string> copies = words;
  std::vector<char*> pointers;
  for (std::string& word : copies) pointers.push_back(word.data());
  pointers.push_back(nullptr);
  const int error = posix_spawnp(&pid_, pointers[0], &actions, nullptr, pointers.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  close(ends[1]);
  if (error) {
    close(output_);
    throw std::system_error(error, std::generic_category(), words[0]);
  }
}

Process::~Process() {
  close(output_);
  kill(pid_, SIGTERM);
  const auto end = Clock::now() + std::chrono::milliseconds(500);
  while (waitpid(pid_, nullptr, WNOHANG) == 0) {
    if (Clock::now() > end) kill(pid_, SIGKILL);
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

std::optional<std::string> Process::line(double seconds) {
  const auto end = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  for (;;) {
    if (const size_t at = held_.find('\n'); at != held_.npos) {
      std::string line = held_.substr(0, at);
      held_.erase(0, at + 1);
      if (!std::exchange(skipping_, false)) return line;
      continue;
    }
    if (held_.size() > kLongestLine) {
      std::string line = std::exchange(held_, {});
      if (!std::exchange(skipping_, true)) return line;
    }
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now()).count();
    if (ended_ && !held_.empty() && !skipping_) return std::exchange(held_, {});
    if (ended_ || left < 0) return std::nullopt;
    pollfd waited{output_, POLLIN, 0};
    if (poll(&waited, 1, static_cast<int>(left)) <= 0) continue;
    char part[4096];
    const ssize_t count = read(output_, part, sizeof part);
    if (count > 0) held_.append(part, static_cast<size_t>(count));
    if (count == 0 || (count < 0 && errno != EINTR && errno != EAGAIN)) ended_ = true;
  }
}

}  // namespace pykd::runtime
