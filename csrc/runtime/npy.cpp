#include "runtime/npy.h"

#include <bit>
#include <cstring>
#include <string_view>

#include "runtime/model_file.h"

namespace pykd::runtime {
namespace {

static_assert(std::endian::native == std::endian::little, "the files' numbers are little-endian");

constexpr std::string_view kMagic = "\x93NUMPY";
constexpr size_t kHighestRank = 8, kLongestHeader = 64 << 10;
constexpr int64_t kMostElements = int64_t{1} << 40;

[[noreturn]] void refuse(const char* why) {
  throw FormatError(std::string(why) + ": write it by numpy.save(file, numpy.ascontiguousarray(array, numpy.float32))");
}

// The header, a Python dictionary in one of the few ways numpy writes it.
class Header {
 public:
  explicit Header(std::string_view text) : text_(text) {}

  void parse() {
    unsigned seen = 0;
    expect('{');
    while (!take('}')) {
      const std::string_view key = quoted();
      expect(':');
      if (key == "descr" && !(seen & 1)) {
        seen |= 1;
        descr = quoted();
      } else if (key == "fortran_order" && !(seen & 2)) {
        seen |= 2;
        fortran_order = take("True");
        if (!fortran_order && !take("False")) refuse("the header's fortran_order is neither True nor False");
      } else if (key == "shape" && !(seen & 4)) {
        seen |= 4;
        read_shape();
      } else {
        refuse("the header has a key twice, or one that .npy files have not");
      }
      if (!take(',')) {
        expect('}');
        break;
      }
    }
    skip();
    if (!text_.empty()) refuse("the header goes on behind its dictionary");
    if (seen != 7) refuse("the header lacks descr, fortran_order or shape");
  }

  std::string_view descr;
  bool fortran_order = false;
  std::vector<int64_t> shape;

 private:
  void skip() {
    while (!text_.empty() && (text_[0] == ' ' || text_[0] == '\n')) text_.remove_prefix(1);
  }
  bool take(std::string_view word) {
    skip();
    if (!text_.starts_with(word)) return false;
    text_.remove_prefix(word.size());
    return true;
  }
  bool take(char letter) { return take(std::string_view(&letter, 1)); }
  void expect(char letter) {
    if (!take(letter)) refuse("the header is no dictionary of descr, fortran_order and shape");
  }

  std::string_view quoted() {
    const char quote = take('"') ? '"' : '\'';
    if (quote == '\'') expect('\'');
    const size_t end = text_.find(quote);
    if (end == std::string_view::npos) refuse("a text in the header does not end");
    const std::string_view inside = text_.substr(0, end);
    text_.remove_prefix(end + 1);
    return inside;
  }

  void read_shape() {
    expect('(');
    while (!take(')')) {
      int64_t side = 0;
      size_t digits = 0;
      skip();
      for (; digits < text_.size() && text_[digits] >= '0' && text_[digits] <= '9'; ++digits) {
        side = 10 * side + (text_[digits] - '0');
        if (side > kMostElements) refuse("a side of the shape is too large");
      }
      if (digits == 0) refuse("the shape is no tuple of whole numbers");
      text_.remove_prefix(digits);
      shape.push_back(side);
      if (shape.size() > kHighestRank) refuse("the shape has more than 8 sides");
      if (!take(',')) {
        expect(')');
        break;
      }
    }
  }

  std::string_view text_;
};

}  // namespace

Array parse_npy(const unsigned char* bytes, size_t size) {
  const std::string_view file(reinterpret_cast<const char*>(bytes), size);
  if (!file.starts_with(kMagic) || size < 10) refuse("it is no .npy file");
  const unsigned version = bytes[6];
  const size_t prefix = version == 1 ? 10 : 12;
  if ((version != 1 && version != 2) || bytes[7] != 0 || size < prefix)
    refuse("it is no .npy file of format 1.0 or 2.0");
  size_t length = 0;
  std::memcpy(&length, bytes + 8, prefix - 8);
  if (length > kLongestHeader || length > size - prefix)
    refuse("its header is longer than 65536 bytes or than the file");
  Header header(file.substr(prefix, length));
  header.parse();
  if (header.fortran_order) refuse("it is stored by columns (fortran_order)");
  Array array{header.shape, header.descr == "|u1", bytes + prefix + length, 1};
  if (!array.pixels && header.descr != "<f4") refuse("its elements are neither float32 nor uint8");
  for (const int64_t side : array.shape)
    if (__builtin_mul_overflow(array.count, side, &array.count) || array.count > kMostElements)
      refuse("its shape has more elements than any file");
  const size_t held = size - prefix - length;
  if (held != static_cast<size_t>(array.count) * (array.pixels ? 1 : 4))
    refuse("its shape asks for more or fewer bytes than it holds");
  return array;
}

std::string npy_head(const std::vector<int64_t>& shape) {
  std::string sides;
  for (const int64_t side : shape) sides += std::to_string(side) + ", ";
  std::string dictionary = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + sides + "), }";
  dictionary.append(63 - (10 + dictionary.size()) % 64, ' ');  // elements begin at a multiple of 64
  dictionary += '\n';
  const auto length = static_cast<uint16_t>(dictionary.size());
  std::string head(kMagic);
  head += {'\1', '\0', static_cast<char>(length & 0xFF), static_cast<char>(length >> 8)};
  return head + dictionary;
}

}  // namespace pykd::runtime
