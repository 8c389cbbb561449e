// The readers of .npy files and of PPM and PGM images: what they read, what they refuse and by which word, and mutants
// of good files, which they read or refuse without reading beyond them.
#include "runtime/npy.h"

#include <cstring>
#include <memory>
#include <random>
#include <string>

#include "core/kernel_test.h"
#include "runtime/image.h"
#include "runtime/model_file.h"

namespace {

using namespace pykd::testing;
using pykd::runtime::Array;
using pykd::runtime::FormatError;
using pykd::runtime::Image;

// In memory of its own, at whose end an AddressSanitizer watches.
struct Exact {
  explicit Exact(const std::string& text) : bytes(new unsigned char[text.size()]), size(text.size()) {
    std::memcpy(bytes.get(), text.data(), size);
  }
  std::unique_ptr<unsigned char[]> bytes;
  size_t size;
};

std::string npy(const std::string& dictionary, size_t elements, int version = 1) {
  std::string file = "\x93NUMPY";
  file += {static_cast<char>(version), '\0'};
  for (int byte = 0; byte < (version == 1 ? 2 : 4); ++byte)
    file += static_cast<char>(dictionary.size() >> 8 * byte & 0xFF);
  file += dictionary;
  for (size_t i = 0; i < elements; ++i) file += static_cast<char>(i);
  return file;
}

std::string head(const std::string& shape, const std::string& descr = "<f4", const std::string& order = "False") {
  return "{'descr': '" + descr + "', 'fortran_order': " + order + ", 'shape': " + shape + ", }   \n";
}

template <typename Parse>
void refused(const Parse& parse, const std::string& file, const std::string& word) {
  const Exact exact(file);
  std::string said = "nothing";
  try {
    parse(exact.bytes.get(), exact.size);
  } catch (const FormatError& error) {
    said = error.what();
  }
  check(said.find(word) != std::string::npos, "'" + word + "', said: " + said);
}

void test_npy() {
  for (const int version : {1, 2})
    for (const auto& [shape, sides] : {std::pair<std::string, std::vector<int64_t>>{"(2, 3)", {2, 3}},
                                       {"(6,)", {6}},
                                       {"(6)", {6}},
                                       {"(1,1,6,)", {1, 1, 6}}}) {
      const Exact file(npy(head(shape), 24, version));
      const Array array = pykd::runtime::parse_npy(file.bytes.get(), file.size);
      check(array.shape == sides && !array.pixels && array.count == 6, shape);
      check(array.elements == file.bytes.get() + file.size - 24, shape + ": where its elements begin");
    }
  const auto parsed = [](const std::string& text) {
    const Exact file(text);
    const Array array = pykd::runtime::parse_npy(file.bytes.get(), file.size);
    return std::pair(array.count, array.pixels);
  };
  check(parsed(npy(head("(5,)", "|u1"), 5)) == std::pair(int64_t{5}, true), "pixels");
  check(parsed(npy(head("()"), 4)) == std::pair(int64_t{1}, false), "a number alone");
  check(parsed(npy(head("(0, 7)"), 0)) == std::pair(int64_t{0}, false), "no rows");
  check(parsed(npy("{\"shape\":(1,),\"fortran_order\":False,\"descr\":\"<f4\"}", 4)).first == 1, "another order");
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{}, {3}, {2, 10}, {65536, 1, 28, 28}}) {
    size_t bytes = 4;
    for (const int64_t side : shape) bytes *= static_cast<size_t>(side);
    const std::string written = pykd::runtime::npy_head(shape);
    check(written.size() % 64 == 0, "the elements' alignment");
    const Exact file(written + std::string(bytes, '\0'));
    check(pykd::runtime::parse_npy(file.bytes.get(), file.size).shape == shape, "what is written is read");
  }
}

void test_refused_npy() {
  const auto no = [](const std::string& file, const std::string& word) {
    refused(pykd::runtime::parse_npy, file, word);
  };
  const std::string good = npy(head("(2, 3)"), 24);
  no("", "no .npy");
  no("P5 1 1 255 x", "no .npy");
  no(good.substr(0, 7), "no .npy");
  no(good.substr(0, 9), "no .npy");
  no(npy(head("(2, 3)"), 24, 3), "format 1.0 or 2.0");
  no(npy("", 0, 2).substr(0, 11), "format 1.0 or 2.0");
  no(good.substr(0, 20), "than the file");
  no(npy(head("(1,)") + std::string(70'000, ' '), 4, 2), "longer than 65536");
  no(good.substr(0, good.size() - 1), "more or fewer bytes");
  no(good + "x", "more or fewer bytes");
  no(npy(head("(2, 4)"), 24), "more or fewer bytes");
  no(npy(head("(2, 3)", "<f4", "True"), 24), "by columns");
  no(npy(head("(2, 3)", "<f4", "0"), 24), "neither True nor False");
  for (const char* descr : {"<f8", ">f4", "<f2", "|b1", "<i4", "O", "|V4"})
    no(npy(head("(2, 3)", descr), 24), "neither float32 nor uint8");
  no(npy(head("(1099511627776, 1099511627776)"), 24), "than any file");
  no(npy(head("(4294967296, 4294967296)"), 0), "than any file");
  no(npy(head("(2199023255552,)"), 24), "too large");
  no(npy(head("(99999999999999999999999999,)"), 24), "too large");
  no(npy(head("(1,1,1,1,1,1,1,1,6)"), 24), "more than 8");
  no(npy(head("(-6,)"), 24), "tuple of whole numbers");
  no(npy(head("[6]"), 24), "no dictionary");
  no(npy(head("(6"), 24), "tuple of whole numbers");
  no(npy("{'descr': '<f4', 'fortran_order': False}", 24), "lacks");
  no(npy("{'descr': '<f4', 'descr': '<f4', 'shape': (6,)}", 24), "twice");
  no(npy("{'shape': (6,), 'descr': '<f4", 24), "does not end");
  no(npy("{'shape' (6,)}", 24), "no dictionary");
  no(npy("__import__('os')", 24), "no dictionary");
  no(npy(head("(6,)") + "x", 24), "goes on");
}

Image parsed_image(const std::string& text) {
  const Exact file(text);
  return pykd::runtime::parse_image(file.bytes.get(), file.size);
}

void test_images() {
  const std::vector<uint8_t> grey = {1, 2, 3, 4, 5, 255}, colours = {1, 4, 2, 5, 3, 255};
  for (const std::string& text : {std::string("P5 3 2 255\n\1\2\3\4\5\xFF"), std::string("P2 3 2 255 1 2 3 4 5 255"),
                                  std::string("P2\n# of a test\n3 # wide\n2\n255\n1\t2 3\r\n4 5 255 \n")}) {
    const Image image = parsed_image(text);
    check(image.channels == 1 && image.width == 3 && image.height == 2 && image.pixels == grey, text);
  }
  for (const std::string& text :
       {std::string("P6 2 1 255\n\1\2\3\4\5\xFF"), std::string("P3#\n2 1 255 1 2 3 4 5 255")}) {
    const Image image = parsed_image(text);
    check(image.channels == 3 && image.width == 2 && image.height == 1 && image.pixels == colours, text);
  }
  check(parsed_image("P2 4 1 3 0 1 2 3").pixels == std::vector<uint8_t>{0, 85, 170, 255}, "a largest value of 3");
  check(parsed_image(std::string("P5 2 1 1 \0\1", 11)).pixels == std::vector<uint8_t>{0, 255}, "a largest value of 1");
  check(parsed_image("P5 1 1 255 #").pixels == std::vector<uint8_t>{'#'}, "a pixel that looks like a comment");

  const Image one = parsed_image("P2 2 1 255 7 9"), three = pykd::runtime::with_channels(one, 3);
  check(three.channels == 3 && three.pixels == std::vector<uint8_t>{7, 9, 7, 9, 7, 9}, "grey to colours");
  check(pykd::runtime::with_channels(three, 1).pixels == one.pixels, "grey colours to grey");
  const Image pure = parsed_image("P3 4 1 255 255 0 0 0 255 0 0 0 255 255 255 255");
  check(pykd::runtime::with_channels(pure, 1).pixels == std::vector<uint8_t>{76, 150, 29, 255}, "colours to grey");
  check(pykd::runtime::with_channels(pure, 3).pixels == pure.pixels, "as it is");
}

void test_refused_images() {
  const auto no = [](const std::string& file, const std::string& word) {
    refused(pykd::runtime::parse_image, file, word);
  };
  no("", "no PPM or PGM");
  no("P5", "no PPM or PGM");
  no("P4 1 1 x", "no PPM or PGM");
  no("P52 1 1 255 x", "no PPM or PGM");
  no("\x89PNG\r\n", "no PPM or PGM");
  no("P5 ", "width");
  no("P5 0 1 255 ", "width");
  no("P5 x 1 255 ", "width");
  no("P5 65537 1 255 ", "width");
  no("P5 99999999999999999999999 1 255 ", "width");
  no("P5 1 -1 255 ", "height");
  no("P5 1 1 256 xx", "largest value");
  no("P5 1 1 0 x", "largest value");
  no("P5 1 1 255", "more or fewer pixels");
  no("P5 1 1 255 ", "more or fewer pixels");
  no("P5 1 1 255 xx", "more or fewer pixels");
  no("P6 65536 65536 255 x", "more or fewer pixels");
  no("P2 65536 65536 255 1", "more or fewer pixels");
  no("P5 1 1 5 \x06", "larger than its largest");
  no("P2 2 1 5 1 6", "pixel");
  no("P2 2 1 5 1 #", "pixel");
  no("P2 2 1 5 1 # 5", "pixel");
  no("P2 2 1 5 1 2 3", "more pixels");
}

// Changes a few bytes, cuts, repeats or puts in a number that hurts.
std::string mutated(std::string file, std::mt19937& random) {
  const std::array<std::string, 8> words = {"0", "-1", "4294967296", "18446744073709551615", "True", "(", "#", "'"};
  for (size_t i = 0; i <= random() % 3; ++i) {
    const size_t at = file.empty() ? 0 : random() % file.size();
    switch (file.empty() ? 5 : random() % 6) {
      case 0: file[at] = static_cast<char>(file[at] ^ 1 << random() % 8); break;
      case 1: file[at] = static_cast<char>(random()); break;
      case 2: file.resize(at); break;
      case 3: file.erase(at, 1 + random() % 4); break;
      case 4: file.insert(at, file.substr(random() % file.size(), random() % 16)); break;
      case 5: file.insert(at, words[random() % words.size()]); break;
    }
  }
  return file;
}

void test_mutants() {
  const std::array<std::string, 8> seeds = {
      npy(head("(2, 3)"), 24),  npy(head("(4, 1, 2, 3)", "|u1"), 24, 2),
      npy(head("(6,)"), 24, 2), npy("{'shape':(1,),'fortran_order':False,'descr':'<f4'}", 4),
      "P5 3 2 255\n123456",     "P6 # two\n2 1 200\n123456",
      "P2 3 2 9 1 2 3 4 5 9\n", "P3\n2\n1\n255\n1 2 3 4 5 255"};
  std::mt19937 random(20264);
  int read = 0;
  const int mutants = kSlow ? 10'000 : 100'000;
  for (int i = 0; i < mutants; ++i) {
    const size_t seed = static_cast<size_t>(i) % seeds.size();
    const Exact file(mutated(seeds[seed], random));
    try {
      if (seed < 4) {
        const Array array = pykd::runtime::parse_npy(file.bytes.get(), file.size);
        const auto bytes = static_cast<size_t>(array.count) * (array.pixels ? 1 : 4);
        const bool inside = array.elements + bytes == file.bytes.get() + file.size;
        if (!inside) check(false, "elements beyond the file");
      } else {
        const Image image = pykd::runtime::parse_image(file.bytes.get(), file.size);
        const auto count = static_cast<size_t>(image.channels * image.height * image.width);
        if (image.pixels.size() != count || count > file.size) check(false, "pixels that the file does not hold");
      }
      ++read;
    } catch (const FormatError&) {
    }
  }
  std::printf("%d mutants, of which %d were read\n", mutants, read);
  check(read > mutants / 100 && read < mutants / 2, "some mutants are good, most are not");
}

}  // namespace

int main() {
  test_npy();
  test_refused_npy();
  test_images();
  test_refused_images();
  test_mutants();
  return report();
}
