#include "runtime/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "runtime/model_file.h"

namespace pykd::runtime {

Bytes read_file(const std::string& path, int64_t most, const std::string& what) {
  const auto cannot_read = [&path] {
    throw FormatError("cannot read " + path + ": " + std::generic_category().message(errno));
  };
  struct Descriptor {
    int number;
    ~Descriptor() {
      if (number >= 0) close(number);
    }
  };
  const Descriptor descriptor{
      open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC)};  // a pipe would wait for its writer
  if (descriptor.number < 0) cannot_read();
  struct stat status;
  if (fstat(descriptor.number, &status)) cannot_read();
  if (!S_ISREG(status.st_mode) || status.st_size > most)
    throw FormatError(path + " is no " + what + ": give a file of at most " + std::to_string(most) + " bytes");
  // Read, not mapped: what was checked must be what is used, whoever writes to the file meanwhile.
  Bytes bytes{std::make_unique_for_overwrite<unsigned char[]>(static_cast<size_t>(status.st_size)), 0};
  while (bytes.size < static_cast<size_t>(status.st_size)) {
    const ssize_t more =
        read(descriptor.number, bytes.data.get() + bytes.size, static_cast<size_t>(status.st_size) - bytes.size);
    if (more < 0 && errno == EINTR) continue;
    if (more < 0) cannot_read();
    if (more == 0) break;
    bytes.size += static_cast<size_t>(more);
  }
  return bytes;
}

}  // namespace pykd::runtime
