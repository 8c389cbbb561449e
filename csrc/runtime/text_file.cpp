#include "runtime/text_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <system_error>
#include <utility>

#include "runtime/model_file.h"

namespace pykd::runtime {
namespace {

constexpr size_t kMost = 1 << 20;
constexpr size_t kLongestLine = 200;
constexpr std::string_view kSpace = " \t\r\n\f\v";

// As many bytes as fit, or -1.
ssize_t read_from(int descriptor, char* to, size_t most, size_t at) {
  ssize_t count;
  do count = pread(descriptor, to, most, static_cast<off_t>(at));
  while (count < 0 && errno == EINTR);
  return count;
}

}  // namespace

TextFile::TextFile(const std::string& path)
    : descriptor_(open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC)) {}  // a pipe would wait for its writer
TextFile::~TextFile() {
  if (descriptor_ >= 0) close(descriptor_);
}
TextFile::TextFile(TextFile&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
TextFile& TextFile::operator=(TextFile&& other) noexcept {
  std::swap(descriptor_, other.descriptor_);
  return *this;
}

std::optional<std::string> TextFile::text() const {
  std::string text;
  char part[4096];
  while (descriptor_ >= 0 && text.size() < kMost) {
    const ssize_t count = read_from(descriptor_, part, sizeof part, text.size());
    if (count < 0) return std::nullopt;
    if (count == 0) break;
    text.append(part, static_cast<size_t>(count));
  }
  return text.empty() ? std::nullopt : std::optional(std::move(text));
}

std::optional<double> TextFile::number() const {
  char text[64];
  const ssize_t count = descriptor_ < 0 ? -1 : read_from(descriptor_, text, sizeof text, 0);
  return count < 0 ? std::nullopt : to_number({text, static_cast<size_t>(count)});
}

std::optional<std::string> read_text(const std::string& path) { return TextFile(path).text(); }
std::optional<double> read_number(const std::string& path) { return TextFile(path).number(); }

std::optional<std::string> read_line(const std::string& path) {
  const auto text = read_text(path);
  std::string line = printable(text.value_or(""));
  return line.empty() ? std::nullopt : std::optional(std::move(line));
}

std::string printable(std::string_view text) {
  text.remove_prefix(std::min(text.find_first_not_of(kSpace), text.size()));
  std::string line;
  for (const char letter : text.substr(0, std::min(text.find_first_of(std::string_view("\n\0", 2)), kLongestLine)))
    if (letter >= ' ' && letter <= '~') line += letter;
  line.erase(line.find_last_not_of(' ') + 1);
  return line;
}

std::optional<double> to_number(std::string_view text) {
  text.remove_prefix(std::min(text.find_first_not_of(kSpace), text.size()));
  text = text.substr(0, text.find_last_not_of(kSpace) + 1);
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(value)) return std::nullopt;
  return value;
}

std::vector<std::string> entries(const std::string& folder, std::string_view begin) {
  std::vector<std::string> found;
  std::error_code error;
  for (std::filesystem::directory_iterator each(folder, error), end; !error && each != end; each.increment(error))
    if (each->path().filename().string().starts_with(begin)) found.push_back(each->path().string());
  std::ranges::sort(found, {}, [](const std::string& path) { return std::pair(path.size(), path); });
  return found;
}

namespace {

// A file beside it, which takes its place when it is whole.
struct Draft {
  explicit Draft(const std::string& where) : path(where), name(where + '.' + std::to_string(getpid())) {
    std::error_code error;
    const auto type = std::filesystem::symlink_status(where, error).type();
    if (type == std::filesystem::file_type::directory) fail(EISDIR);
    if (type != std::filesystem::file_type::regular && std::filesystem::exists(where, error))
      throw FormatError("cannot write " + path + ": it is no ordinary file");  // such as /dev/null, which is to stay
    stream = std::fopen(name.c_str(), "wbx");
    if (!stream) fail(errno);
  }
  ~Draft() { remove(); }
  void remove() {
    if (!stream) return;
    std::fclose(std::exchange(stream, nullptr));
    std::remove(name.c_str());  // unless it was renamed
  }
  [[noreturn]] void fail(int why) {
    remove();
    throw FormatError("cannot write " + path + ": " + std::generic_category().message(why));
  }

  std::string path, name;
  std::FILE* stream = nullptr;
};

}  // namespace

void write_whole(const std::string& path, std::string_view text) {
  Draft draft(path);
  const bool written = std::fwrite(text.data(), 1, text.size(), draft.stream) == text.size() &&
                       std::fflush(draft.stream) == 0 && fsync(fileno(draft.stream)) == 0;
  if (!written || std::rename(draft.name.c_str(), path.c_str())) draft.fail(errno);
}

void check_writable(const std::string& path) { Draft draft(path); }

}  // namespace pykd::runtime
