// PPM and PGM images, read trusting nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pykd::runtime {

struct Image {
  int64_t channels, height, width;  // channels: 1 (grey) or 3 (red, green, blue)
  std::vector<uint8_t> pixels;      // [channels, height, width], 0 to 255
};

// P2, P3, P5 or P6 with a largest value of 1 to 255, to which pixels are scaled. Throws FormatError.
Image parse_image(const unsigned char* bytes, size_t size);

// With 1 or 3 channels: grey is given three times; red, green and blue are weighed by ITU-R BT.601.
Image with_channels(const Image& image, int64_t channels);

}  // namespace pykd::runtime
