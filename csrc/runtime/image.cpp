#include "runtime/image.h"

#include <string>
#include <string_view>

#include "runtime/model_file.h"

namespace pykd::runtime {
namespace {

constexpr int64_t kLargestSide = 1 << 16;

[[noreturn]] void refuse(const std::string& why) {
  throw FormatError(why + ": write it as binary PPM or PGM with a largest value of 255");
}

bool is_space(unsigned char letter) { return letter == ' ' || (letter >= '\t' && letter <= '\r'); }

class Reader {
 public:
  Reader(const unsigned char* at, const unsigned char* end) : at_(at), end_(end) {}

  // The next whole number, behind spaces and comments.
  int64_t number(const char* what, int64_t least, int64_t most) {
    while (at_ != end_ && (is_space(*at_) || *at_ == '#')) {
      if (*at_ == '#') {
        while (at_ != end_ && *at_ != '\n') ++at_;
      } else {
        ++at_;
      }
    }
    int64_t value = 0;
    const unsigned char* const begin = at_;
    for (; at_ != end_ && *at_ >= '0' && *at_ <= '9' && value <= most; ++at_) value = 10 * value + (*at_ - '0');
    if (at_ == begin || value < least || value > most || (at_ != end_ && !is_space(*at_) && *at_ != '#'))
      refuse(std::string("its ") + what + " is no number from " + std::to_string(least) + " to " +
             std::to_string(most));
    return value;
  }

  int64_t left() const { return end_ - at_; }
  bool blank() const {
    for (const unsigned char* at = at_; at != end_; ++at)
      if (!is_space(*at)) return false;
    return true;
  }
  unsigned char next() { return *at_++; }

 private:
  const unsigned char *at_, *end_;
};

}  // namespace

Image parse_image(const unsigned char* bytes, size_t size) {
  if (size < 3 || bytes[0] != 'P' ||
      std::string_view("2356").find(static_cast<char>(bytes[1])) == std::string_view::npos ||
      !(is_space(bytes[2]) || bytes[2] == '#'))
    refuse("it is no PPM or PGM image");
  const bool binary = bytes[1] >= '5';
  Reader reader(bytes + 2, bytes + size);
  Image image;
  image.channels = bytes[1] == '3' || bytes[1] == '6' ? 3 : 1;
  image.width = reader.number("width", 1, kLargestSide);
  image.height = reader.number("height", 1, kLargestSide);
  const int64_t largest = reader.number("largest value", 1, 255);
  const int64_t places = image.height * image.width, count = places * image.channels;
  if (binary ? reader.left() != count + 1 : reader.left() < 2 * count)  // a space before them, or before each
    refuse("it holds more or fewer pixels than its width and height say");
  if (binary) reader.next();
  image.pixels.resize(static_cast<size_t>(count));
  for (int64_t place = 0; place < places; ++place)
    for (int64_t channel = 0; channel < image.channels; ++channel) {
      const int64_t value = binary ? reader.next() : reader.number("pixel", 0, largest);
      if (value > largest) refuse("a pixel of it is larger than its largest value");
      image.pixels[static_cast<size_t>(channel * places + place)] =
          static_cast<uint8_t>((value * 255 + largest / 2) / largest);
    }
  if (!binary && !reader.blank()) refuse("it holds more pixels than its width and height say");
  return image;
}

Image with_channels(const Image& image, int64_t channels) {
  Image other{channels, image.height, image.width, {}};
  const size_t places = image.pixels.size() / static_cast<size_t>(image.channels);
  if (channels == image.channels) {
    other.pixels = image.pixels;
  } else if (channels == 3) {
    for (int copy = 0; copy < 3; ++copy)
      other.pixels.insert(other.pixels.end(), image.pixels.begin(), image.pixels.end());
  } else {
    for (size_t i = 0; i < places; ++i) {
      const uint32_t weighed = 19595u * image.pixels[i] + 38470u * image.pixels[places + i] +
                               7471u * image.pixels[2 * places + i] + 32768u;  // 0.299, 0.587, 0.114 in 16 bits
      other.pixels.push_back(static_cast<uint8_t>(weighed >> 16));
    }
  }
  return other;
}

}  // namespace pykd::runtime
