// Short texts that the kernel writes anew for whoever reads them, as those below /sys and /proc.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace pykd::runtime {

// A file that is opened once and read from its beginning each time. One that cannot be opened or read, is empty or has
// vanished gives nothing.
class TextFile {
 public:
  TextFile() = default;
  explicit TextFile(const std::string& path);
  ~TextFile();
  TextFile(TextFile&& other) noexcept;
  TextFile& operator=(TextFile&& other) noexcept;

  std::optional<std::string> text() const;  // at most 1 MiB of it
  std::optional<double> number() const;     // where that is all there is

 private:
  int descriptor_ = -1;
};

std::optional<std::string> read_text(const std::string& path);
std::optional<double> read_number(const std::string& path);
std::optional<std::string> read_line(const std::string& path);  // printable() of the first one that is not empty

// The first line in ASCII without what cannot be printed, without space at its ends, of at most 200 letters.
std::string printable(std::string_view text);

std::optional<double> to_number(std::string_view text);  // a finite one, and nothing else

// The entries of a folder whose names begin so, by their numbers: cpu2 before cpu10. None where it cannot be read.
std::vector<std::string> entries(const std::string& folder, std::string_view begin);

// Replaces the file as a whole; both throw FormatError where it cannot be written.
void write_whole(const std::string& path, std::string_view text);
void check_writable(const std::string& path);  // before the work that is to be written

}  // namespace pykd::runtime
