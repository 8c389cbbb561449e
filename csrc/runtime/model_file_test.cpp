// The reader of model files: what good ones say, which rule each kind of bad one breaks, and a hundred thousand
// mutants, which parse or are refused in one sentence, with little memory, and alike when read again.
#include "runtime/model_file.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <random>

#include "core/kernel_test.h"
#include "runtime/fuzz/model_file_samples.h"

namespace {
size_t allocated = 0;  // bytes that operator new has given since it was last set to zero, freed or not
}

// Not inlined, where GCC would take malloc and delete, or new and free, for a mismatch.
[[gnu::noinline]] void* operator new(size_t size) {
  allocated += size;
  if (void* memory = std::malloc(size ? size : 1)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace {

using namespace pykd;
using namespace pykd::runtime;
using pykd::testing::check;
using pykd::testing::Parts;

struct Answer {
  Model model{};
  std::string sentence;  // against the file; empty where there is none
  bool operator==(const Answer&) const = default;
};

double most_allocated = 0;  // for one byte of a file, of all files so far

// Bytes that reading may allocate, freed or not: a result, a document of JSON and the parser's buffers.
size_t allowed(size_t size) { return (size_t{16} << 10) + 40 * size; }

Answer read(const std::string& file) {
  const auto bytes = std::make_unique<unsigned char[]>(file.size());  // exactly as long, so that an over-read is seen
  std::memcpy(bytes.get(), file.data(), file.size());
  Answer answer;
  allocated = 0;
  try {
    answer.model = parse_model(bytes.get(), file.size());
  } catch (const FormatError& error) {
    answer.sentence = error.what();
  }
  const size_t all = allocated;
  if (all > allowed(file.size())) check(false, "allocates " + std::to_string(all) + " bytes: " + answer.sentence);
  if (file.size() > 1000)
    most_allocated = std::max(most_allocated, static_cast<double>(all) / static_cast<double>(file.size()));
  return answer;
}

std::vector<float> dense(const Weight& weight) {
  if (weight.dense) return weight.values;
  int64_t columns = 1;
  for (size_t i = 1; i < weight.shape.size(); ++i) columns *= weight.shape[i];
  const int64_t rows = weight.shape[0], across = (columns + weight.block_columns - 1) / weight.block_columns;
  std::vector<float> matrix(static_cast<size_t>(rows * columns));
  const float* value = weight.values.data();
  for (const int64_t place : weight.positions) {
    for (int64_t i = 0; i < weight.block_rows; ++i) {
      for (int64_t j = 0; j < weight.block_columns; ++j, ++value) {
        const int64_t row = place / across * weight.block_rows + i, column = place % across * weight.block_columns + j;
        if (row < rows && column < columns) matrix[static_cast<size_t>(row * columns + column)] = *value;
      }
    }
  }
  return matrix;
}

// ---- good files ----------------------------------------------------------------------------------------------------

void test_hash() {
  const auto hash = [](const std::string& text) { return sha256(text.data(), text.size()); };
  check(hash("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "SHA-256 of nothing");
  check(hash("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "SHA-256 of abc");
  check(hash("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
        "SHA-256 of two blocks");
}

void test_every_operator() {
  for (size_t type = 0; type < 4; ++type) {
    const auto stored = static_cast<Stored>(type);
    const std::string file = testing::sealed(testing::every_operator(stored)), what = testing::kValueNames[type];
    const Answer answer = read(file);
    const Model& model = answer.model;
    check(answer.sentence.empty(), what + " is read: " + answer.sentence);
    if (model.ops.size() != 15) return check(false, what + " has all steps");
    const std::vector<std::vector<int64_t>> shapes = {{2, 9, 9}, {6, 5, 7}, {6, 5, 7},  {6, 3, 4},  {6, 3, 4},
                                                      {6, 3, 4}, {6, 3, 4}, {12, 3, 4}, {12, 3, 4}, {12, 1, 1},
                                                      {12},      {10},      {10},       {3},        {3}};
    const char* names[] = {"affine",  "conv2d", "leaky_relu", "max_pool2d", "conv2d",
                           "add",     "tanh",   "concat",     "avg_pool2d", "global_avg_pool",
                           "flatten", "linear", "relu",       "linear",     "softmax"};
    for (size_t i = 0; i < 15; ++i) {
      check(name(model.ops[i].kind) == std::string(names[i]), what + ": " + names[i]);
      check(model.ops[i].shape == shapes[i], what + " shape of " + names[i]);
    }
    const auto& ops = model.ops;
    check(model.input_shape == std::vector<int64_t>{2, 9, 9} && model.mean == std::vector<float>{0.5, 0.25} &&
              model.std == std::vector<float>{1, 0.125} && model.stored == stored,
          what + " input");
    check(model.classes == std::vector<std::string>{"a", "b", "\xC3\xA7"} && model.licence == "CC0-1.0" &&
              model.file_bytes == static_cast<int64_t>(file.size()),
          what + " words");
    check(model.provenance == std::vector<std::pair<std::string, std::string>>{{"method", "none"}, {"seed", "-3"}},
          what + " provenance");
    check(ops[0].scale == std::vector<float>{0.5, -2} && ops[0].bias == std::vector<float>{1, 0.25}, what + " affine");
    check(ops[1].stride == std::array<int64_t, 2>{2, 1} && ops[1].padding == std::array<int64_t, 2>{1, 0} &&
              ops[1].bias == std::vector<float>{1, 2, 3, 4, 5, 6},
          what + " conv2d");
    check(ops[2].slope == 0.125, what + " slope");
    check(ops[3].kernel == std::array<int64_t, 2>{2, 2} && ops[3].stride == ops[3].kernel && ops[3].ceil,
          what + " pool");
    check(ops[4].groups == 6 && ops[4].bias.empty() && ops[4].weight.dense, what + " groups");
    check(ops[5].inputs == std::vector<int>{5, 4} && ops[6].inputs == std::vector<int>{6}, what + " inputs");
    check(ops[8].stride == std::array<int64_t, 2>{1, 1} && !ops[8].count_padding && !ops[8].ceil, what + " average");
    check(dense(ops[1].weight) == testing::matrix(108, 4) && dense(ops[4].weight) == testing::matrix(6, 1) &&
              dense(ops[11].weight) == testing::matrix(120, 16) && dense(ops[13].weight) == testing::matrix(30, 99999),
          what + " weights");
    check(ops[11].weight.block_rows == 4 && ops[11].weight.block_columns == 5, what + " block");
  }
}

void test_weights() {
  const std::array<int64_t, 2> blocks[] = {{1, 1}, {1, 16}, {4, 4}, {3, 7}, {100, 1000}};
  for (size_t type = 0; type < 4; ++type) {
    for (const auto& block : blocks) {
      for (int bits = 0; bits <= 16; ++bits) {
        for (const uint32_t every : {1u, 7u, 100u}) {
          const auto matrix = testing::matrix(5 * 67, every);
          const std::array<int64_t, 2> cut = {std::min<int64_t>(block[0], 5), std::min<int64_t>(block[1], 67)};
          const Parts parts = testing::one_layer(static_cast<Stored>(type), matrix, 5, bits, cut);
          const Answer answer = read(testing::sealed(parts));
          const bool right = answer.sentence.empty() && answer.model.ops.size() == 1 &&
                             dense(answer.model.ops[0].weight) == matrix &&
                             answer.model.ops[0].weight.dense == (bits == 0) && answer.model.ops[0].bias[4] == 1.5f;
          check(right, answer.sentence + testing::described({{"type", static_cast<double>(type)},
                                                             {"bits", bits},
                                                             {"block rows", static_cast<double>(block[0])},
                                                             {"one of", every}}));
        }
      }
    }
  }
}

// Gaps of exactly, one less, one more and twice what the largest code passes.
void test_gaps() {
  for (int bits = 1; bits <= 16; ++bits) {
    const size_t escape = (size_t{1} << bits) - 1;
    std::vector<float> matrix(5 * escape + 4);
    size_t place = 0;
    for (const size_t gap : {escape, escape - 1, escape + 1, 2 * escape}) {
      place += gap;
      matrix[place++] = 1;
    }
    const Answer answer = read(testing::sealed(testing::one_layer(Stored::kInt8, matrix, 1, bits, {1, 1})));
    check(answer.sentence.empty() && dense(answer.model.ops[0].weight) == matrix,
          "gaps about the largest code of " + std::to_string(bits) + " bits");
  }
}

void test_half() {
  testing::Writer writer(Stored::kFloat16);
  writer.add_layer("linear", {1, 6}, {1, 1, 1, 1, 1, 1}, 0, {1, 1}, {});
  Parts parts = writer.finish("\"shape\":[6]");
  parts.values = {'\x01', '\x00', '\xFF', '\x03', '\x00', '\x04', '\xFF', '\x7B', '\x00', '\xC0', '\x00', '\x80'};
  const Answer answer = read(testing::sealed(parts));
  check(answer.model.ops.size() == 1 &&
            answer.model.ops[0].weight.values == std::vector<float>{0x1p-24f, 0x3FFp-24f, 0x1p-14f, 65504, -2, 0},
        "float16 from the smallest to the largest");
}

// ---- bad files -----------------------------------------------------------------------------------------------------

// The text with its one place of `from` changed.
std::string changed(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  check(at != text.npos && text.find(from, at + 1) == text.npos, "one place of " + from);
  return at == text.npos ? text : text.replace(at, from.size(), to);
}

void check_refused(const std::string& file, const std::string& sentence) {
  const std::string found = read(file).sentence;
  check(found.find(sentence) != found.npos, "should be refused with '" + sentence + "', got '" + found + "'");
  check(found.size() < 400 && found.find('\n') == found.npos, "one short line: " + found);
}

void test_bad_descriptions() {
  struct Case {
    const char *from, *to, *sentence;
  };
  static const std::string deep = "{\"version\":" + std::string(200'000, '['),
                           long_number = "\"seed\":" + std::string(5000, '9');
  static const std::string many_steps = [] {
    std::string steps = "\"more\":[{\"op\":\"relu\"}";
    for (int i = 0; i < 65'536; ++i) steps += ",{\"op\":\"relu\"}";
    return steps + "],\"ops\":[";
  }();
  const Case cases[] = {
      // the description
      {"\"version\":1", "\"version\":1,\"version\":1", "has the key 'version' twice"},
      {R"("op":"tanh")", R"("op":"tanh","op":"relu")", "has the key 'op' twice"},
      {"{\"version\":1", deep.c_str(), "nested more than 64 deep"},
      {"\"version\":1", "\"version\":NaN", "holds NaN, which is no number"},
      {"\"version\":1", "\"version\":-Infinity", "holds Infinity, which is no number"},
      {"\"version\":1", "\"version\":2", "should have version 1, got 2"},
      {"\"version\":1", "\"version\":true", "should have version 1, got True"},
      {"\"version\":1", "\"version\":1.0", "should have version 1, got 1.0"},
      {"\"version\":1,", "", "should have version 1, got None"},
      {"\"version\":1", "\"version\":01", "is not valid JSON"},
      {"\"version\":1", "\"version\":1,", "is not valid JSON"},
      {"CC0-1.0\"}", "CC0-1.0\"}x", "is not valid JSON"},
      {"CC0-1.0", "\\ud800", "is not valid JSON"},
      {"CC0-1.0", "\xED\xA0\x80", "is not valid JSON"},
      {"{\"version\"", "\xEF\xBB\xBF{\"version\"", "byte order mark"},
      {"CC0-1.0", "CC0\\n", "licence should be a line"},
      {"CC0-1.0", "\xE2\x80\xAE", "licence should be a line"},
      {"\"CC0-1.0\"", "null", "licence should be a line"},
      {"\"ops\"", "\"steps\"", "lacks the key 'ops'"},
      {"\"version\":1", "\"version\":1,\"more\":1", "has the unknown key 'more'"},
      {"\"ops\":[", many_steps.c_str(), "has the unknown key 'more'"},
      {"\"ops\":[{", "\"ops\":[{},{", "step 1 should be one of linear"},
      {R"("a","b","\u00e7")", R"("a")", "classes should be words, none or one for each of 3"},
      {R"("a","b","\u00e7")", "1,2,3", "classes should be words"},
      {R"("\u00e7")", R"("\u200b")", "classes should be words"},
      {"\"seed\":-3", "\"seed\":1.5", "provenance should map words"},
      {"\"seed\"", "\"\\t\"", "provenance should map words"},
      {R"({"method":"none","seed":-3})", "[]", "provenance should map words"},
      {"\"seed\":-3", long_number.c_str(), "not valid JSON"},
      {R"("values":"float32")", R"("values":"float64")", "values should be one of float32"},
      {R"("values":"float32")", R"("values":[])", "values should be one of float32"},
      {R"("values":"float32")", R"("values":"float16")", "tensor 'values' should be one row of F16"},
      // its input
      {R"("shape":[2,9,9],"mean")", R"("shape":[],"mean")", "input should have as shape 1 to 4 sides"},
      {R"("shape":[2,9,9],"mean")", R"("shape":[2,1,1,1,1],"mean")", "input should have as shape 1 to 4 sides"},
      {R"("shape":[2,9,9],"mean")", R"("shape":[2,0,9],"mean")", "input should have as shape"},
      {R"("shape":[2,9,9],"mean")", R"("shape":[2,9.0,9],"mean")", "input should have as shape"},
      {R"("shape":[2,9,9],"mean")", R"("shape":[2,16777217,9],"mean")", "input should have as shape"},
      {R"("shape":[2,9,9],"mean")", R"("shape":[2,16777216,16777216],"mean")", "at most 268435456 entries in all"},
      {R"("shape":[2,9,9],"mean")", R"("shape":[2,16777216,16777216,16777216],"mean")", "entries in all"},
      {R"("dtype":"float32")", R"("dtype":"float64")", "dtype float32, got 'float64'"},
      {R"("dtype":"float32")", R"("dtype":"float32","scale":1)", "input has the unknown key 'scale'"},
      {R"("mean":[0.5,0.25])", R"("mean":[0.5])", "mean and a positive std for each of 2"},
      {R"("mean":[0.5,0.25])", R"("mean":[0.5,1e999])", "mean and a positive std"},
      {R"("std":[1,0.125])", R"("std":[1,0])", "mean and a positive std"},
      {R"(,"std":[1,0.125])", "", "mean and a positive std"},
      // its steps
      {R"({"op":"affine"})", R"("affine")", "step 1 should be one of linear"},
      {R"("op":"affine")", R"("op":"exec")", "step 1 should be one of linear"},
      {R"("op":"affine")", R"("op":["affine"])", "step 1 should be one of linear"},
      {R"("op":"tanh")", R"("op":"tanh","in":[7])", "tanh in step 7 should read earlier values, got [7]"},
      {R"("op":"tanh")", R"("op":"tanh","in":[-1])", "should read earlier values"},
      {R"("op":"tanh")", R"("op":"tanh","in":[4294967296])", "should read earlier values"},
      {R"("op":"tanh")", R"("op":"tanh","in":[true])", "should read earlier values"},
      {R"("op":"tanh")", R"("op":"tanh","in":6)", "should read earlier values"},
      {R"("op":"tanh")", R"("op":"tanh","in":[])", "tanh in step 7 has 0 inputs"},
      {R"("op":"tanh")", R"("op":"tanh","in":[5,5])", "tanh in step 7 has 2 inputs"},
      {R"("op":"affine")", R"("op":"affine","in":[])", "affine in step 1 has 0 inputs"},
      {R"(,"in":[5,4])", "", "add in step 6 has 1 inputs"},
      {R"("op":"tanh")", R"("op":"tanh","slope":1)", "tanh has no option 'slope' in step 7"},
      {R"("op":"tanh")", R"("op":"tanh","bits":1)", "tanh has no option 'bits' in step 7"},
      {"0.125}", "\"a\"}", "leaky_relu should have as slope a number, got 'a' in step 3"},
      {"0.125}", "1e999}", "slope a number, got inf"},
      {R"("kernel":[2,2],)", "", "max_pool2d should have as kernel two whole numbers"},
      {R"("kernel":[2,2])", R"("kernel":[2])", "kernel two whole numbers from 1"},
      {R"("kernel":[2,2])", R"("kernel":[0,2])", "kernel two whole numbers from 1"},
      {R"("kernel":[2,2])", R"("kernel":[90,2])", "kernel is larger than its image"},
      {R"("kernel":[2,2])", R"("kernel":[2,2],"stride":[])", "stride two whole numbers from 1"},
      {R"("kernel":[2,2])", R"("kernel":[2,2],"padding":[2,0])", "padded by half its kernel at most"},
      {R"("kernel":[2,2])", R"("kernel":[2,2],"padding":[-1,0])", "padding two whole numbers from 0"},
      {R"("kernel":[2,2])", R"("kernel":[2,2],"dilation":[16777216,16777216])", "kernel is larger than its image"},
      {R"("ceil":true)", R"("ceil":1)", "ceil true or false"},
      {R"("groups":6)", R"("groups":0)", "groups a positive whole number"},
      {R"("groups":6)", R"("groups":2)", "in 2 groups does not take [6, 3, 4]"},
      {R"("in":[5,4])", R"("in":[5,1])", "add needs inputs of one shape"},
      {R"("in":[7,5])", R"("in":[7,1])", "concat needs inputs that differ in their first side alone"},
      {R"({"op":"global_avg_pool"},)", "", "linear of a weight [10, 12] does not take [144]"},
      {R"({"op":"flatten"},)", "", "linear of a weight [10, 12] does not take [12, 1, 1]"},
      {R"({"op":"relu"})", R"({"op":"global_avg_pool"})", "needs an image [channels, height, width], got [10]"},
      // its weights
      {R"("shape":[10,12])", R"("shape":[10])", "linear has a weight of 1 sides"},
      {R"("shape":[10,12])", R"("shape":[10,12,1,1])", "linear has a weight of 4 sides"},
      {R"("shape":[10,12])", R"("shape":"ab")", "linear should have as shape"},
      {R"("shape":[10,12],)", "", "linear should have as shape 1 to 4 sides from 1 to 16777216, got None"},
      {R"("shape":[10,12])", R"("shape":[16777216,16777216])", "all weights together should have at most 268435456"},
      {R"("shape":[6,2,3,3])", R"("shape":[16777216,16777216,16777216,16777216])", "all weights together"},
      {R"("block":[4,5])", R"("block":[4])", "block should be two whole numbers"},
      {R"("block":[4,5])", R"("block":[4,0])", "block should be two whole numbers"},
      {R"("block":[4,5])", R"("block":[4.0,5.0])", "block should be two whole numbers"},
      {R"("block":[4,5])", R"("block":[4,5],"bias":1)", "bias should be true or false"},
      {R"("block":[4,5])", R"("block":[4,5],"bias":false)", "tensor 'vectors' has 10 entries that no step takes"},
      {R"("shape":[3,10],"block":[1,1])", R"("shape":[3,10],"bias":true,"block":[1,1])", "has the key 'bias' twice"},
      {R"("bits":2,)", "", "bits and codes should be those of 9 places, got [None, "},
      {R"("bits":2)", R"("bits":0)", "bits and codes should be those of"},
      {R"("bits":2)", R"("bits":17)", "bits and codes should be those of"},
      {R"("bits":2)", R"("bits":null)", "bits and codes should be those of"},
      {R"("bits":2,"codes":)", R"("bits":2,"codes":-)", "bits and codes should be those of"},
      {R"("bits":2,"codes":)", R"("bits":2,"codes":1152921504606846976,"code":)", "has no option 'code'"},
      {R"("bits":3,"codes":)", R"("bits":3,"codes":99)", "bits and codes should be those of"},
      // its hashes
      {"@values", "0000", "tensor 'values' was changed"},
      {"\"@values\"", "0", "tensor 'values' was changed"},
      {R"("indices":"@indices")", R"("more":"@indices")", "sha256 should have an entry for each tensor"},
      {R"(,"indices":"@indices")", "", "sha256 should have an entry for each tensor"},
  };
  for (const Case& each : cases) {
    Parts parts = testing::every_operator(Stored::kFloat32);
    parts.description = changed(parts.description, each.from, each.to);
    check_refused(testing::sealed(parts), each.sentence);
  }
  for (const auto& [text, sentence] : {std::pair{"", "is not valid JSON"}, {"[]", "should be a JSON object"}}) {
    Parts parts = testing::every_operator(Stored::kFloat32);
    parts.description = text;
    check_refused(testing::sealed(parts), sentence);
  }
  const auto with_steps = [](int count, const std::string& shape) {
    Parts parts;
    parts.description =
        R"({"version":1,"input":{"dtype":"float32","shape":)" + shape + R"(},"values":"float32","ops":[)";
    for (int i = 0; i < count; ++i) parts.description += i ? R"(,{"op":"relu"})" : R"({"op":"relu"})";
    parts.description += R"(],"classes":[],"sha256":{},"provenance":{},"licence":""})";
    return testing::sealed(parts);
  };
  check_refused(with_steps(65'537, "[1]"), "ops should be a list of at most 65536 steps");
  check(read(with_steps(65'536, "[1]")).model.ops.size() == 65'536, "as many steps as there may be");
  check(read(with_steps(0, "[1]")).sentence.empty(), "no steps");
  check_refused(with_steps(0, "[16777216,16777216]"), "at most 268435456 entries in all");
  check_refused(with_steps(65'536, "[4097]"), "at most 268435456 entries in all");
}

void test_bad_headers() {
  struct Case {
    const char *from, *to, *sentence;
  };
  const Case cases[] = {
      {R"("values":)", R"("values":{},"values":)", "the header has the key 'values' twice"},
      {R"("values":)", R"("other":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"values":)", "got 'other'"},
      {R"("values":)", R"("other":null,"values":)", "should have dtype, shape and data_offsets and nothing else"},
      {R"({"dtype":"F32","shape":[65])", R"({"more":1,"dtype":"F32","shape":[65])", "and nothing else"},
      {R"("F32","shape":[65])", R"("F64","shape":[65])", "tensor 'values' should be of F32"},
      {R"("F32","shape":[65])", R"([],"shape":[65])", "tensor 'values' should be of F32"},
      {R"("F32","shape":[65])", R"("U8","shape":[65])", "does not fill the bytes"},
      {R"("F32","shape":[65])", R"("F32","shape":[1,65])", "tensor 'values' should be one row of F32"},
      {R"("U8")", R"("I8")", "tensor 'indices' should be one row of U8"},
      {R"("shape":[65])", R"("shape":[1,1,1,1,1,1,1,1,65])", "should have at most 8 sides"},
      {R"("shape":[65])", R"("shape":[-1])", "should have at most 8 sides"},
      {R"("shape":[65])", R"("shape":[18446744073709551616])", "should have at most 8 sides"},
      {R"("shape":[65])", R"("shape":[4611686018427387904,4])", "does not fill the bytes"},  // 2^64 bytes
      {R"("shape":[65])", R"("shape":[65,4611686018427387904,4,0])", "does not fill the bytes"},
      {R"("shape":[65])", R"("shape":"ab")", "should have at most 8 sides"},
      {R"("data_offsets":[)", R"("data_offsets":[0],"offsets":[)", "and nothing else"},
  };
  const Parts parts = testing::every_operator(Stored::kFloat32);
  const std::string entries = testing::entries_of(parts),
                    end = std::to_string(parts.values.size() + parts.vectors.size());
  const std::string values = "\"shape\":[" + std::to_string(parts.values.size() / 4) + "]";
  const auto at = [&entries](const char* name) { return entries.find(name); };
  for (const Case& each : cases) {
    std::string from = each.from, to = each.to;
    testing::replace_all(from, R"("shape":[65])", values);
    testing::replace_all(to, "65", std::to_string(parts.values.size() / 4));
    const bool in_values = from.find("F32") != from.npos || from.find("offsets") != from.npos;
    const size_t begin = in_values ? at("\"values\"") : 0, last = in_values ? at("\"indices\"") : entries.size();
    const std::string part = changed(entries.substr(begin, last - begin), from, to);
    check_refused(testing::sealed(parts, entries.substr(0, begin) + part + entries.substr(last)), each.sentence);
  }
  const auto with_offsets = [&](int64_t first, int64_t second) {
    const std::string from = "[" + std::to_string(parts.vectors.size()) + "," + end + "]";
    const auto moved = [](const std::string& number, int64_t by) { return std::to_string(std::stoll(number) + by); };
    return testing::sealed(
        parts, changed(entries, from,
                       "[" + moved(std::to_string(parts.vectors.size()), first) + "," + moved(end, second) + "]"));
  };
  check_refused(with_offsets(4, 4), "should begin where the one before ends");
  check_refused(with_offsets(-4, -4), "should begin where the one before ends");
  check_refused(with_offsets(0, 4), "does not fill the bytes");
  check_refused(with_offsets(-10'000, 0), "should have two offsets");
  check_refused(testing::sealed(parts, entries.substr(0, at("\"indices\""))), "and the data after");
  check_refused(testing::sealed(parts, entries.substr(at("\"values\""))), "should begin where the one before ends");

  std::string tensors;
  for (int i = 0; i <= 65'536; ++i) tensors += "\"" + std::to_string(i) + "\":{},";
  check_refused(testing::sealed(parts, tensors), "at most 65536 tensors");

  const std::string good = testing::sealed(parts);
  for (const size_t size : {size_t{0}, size_t{7}})
    check_refused(good.substr(0, size), "bytes, too few for a safetensors");
  for (const size_t size : {size_t{8}, size_t{100}}) check_refused(good.substr(0, size), "bytes, and only");
  check_refused(good.substr(0, good.size() - 1), "and the data after");
  check_refused(good + '\0', "its tensors end at byte");
  check_refused(testing::little_endian((16 << 20) + 1, 8) + good.substr(8), "its header should have at most 16777216");
  check_refused(testing::little_endian(~uint64_t{0}, 8) + good.substr(8), "its header should have at most 16777216");
  const auto with_header = [](const std::string& text) { return testing::little_endian(text.size(), 8) + text; };
  check_refused(with_header(""), "the header is not valid JSON");
  check_refused(with_header("[]"), "the header should be a JSON object");
  check_refused(with_header("7"), "the header should be a JSON object");
  check_refused(with_header("\xFF{}"), "the header is not valid JSON");
  check_refused(with_header(std::string("{}\0", 3)), "a zero byte");
  check_refused(with_header("{}"), "metadata should have the keys 'pykd' and 'sha256'");
  check_refused(with_header(R"({"__metadata__":[]})"), "__metadata__ should map words to words");
  check_refused(with_header(R"({"__metadata__":{"pykd":1}})"), "__metadata__ should map words to words");
  check_refused(with_header(R"({"__metadata__":{"pykd":"{}","sha256":"0"}})"), "its description was changed");
  check_refused(with_header(R"({"__metadata__":{"pykd":"","sha256":"","format":"pt"}})"),
                "metadata should have the keys");
}

void test_bad_tensors() {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto refused = [](const std::function<void(Parts&)>& change, const char* sentence,
                          Parts parts = testing::every_operator(Stored::kFloat32)) {
    change(parts);
    check_refused(testing::sealed(parts), sentence);
  };
  refused([&](Parts& parts) { std::memcpy(parts.values.data(), &nan, 4); }, "tensor 'values' holds NaN or infinity");
  refused([&](Parts& parts) { std::memcpy(parts.vectors.data() + 4, &nan, 4); }, "tensor 'vectors' holds NaN");
  refused([](Parts& parts) { parts.values[1] = '\x7C'; }, "holds NaN", testing::every_operator(Stored::kFloat16));
  refused([](Parts& parts) { parts.values.replace(0, 2, "\x80\x7F"); }, "holds NaN",
          testing::every_operator(Stored::kBFloat16));
  refused([](Parts& parts) { parts.values.resize(parts.values.size() - 4); }, "tensor 'values' ends too early: a step");
  refused([](Parts& parts) { parts.values += "abcd"; }, "tensor 'values' has 1 entries that no step takes");
  refused([](Parts& parts) { parts.vectors += "abcd"; }, "tensor 'vectors' has 1 entries that no step takes");
  refused([](Parts& parts) { parts.indices.pop_back(); }, "tensor 'indices' ends too early");
  refused([](Parts& parts) { parts.indices += 'a'; }, "tensor 'indices' has 1 entries that no step takes");
  refused([](Parts& parts) { parts.indices.assign(parts.indices.size(), '\xFF'); }, "leads to no position in step 2");
  refused([](Parts& parts) { parts.indices[0] = parts.indices[1] = '\x77'; }, "in step ");
  const auto layer = [](Stored stored) { return testing::one_layer(stored, testing::matrix(9, 1), 3, 4, {2, 2}); };
  // Four blocks of codes 0: the second reaches over the right edge, and its second value is over it.
  refused([](Parts& parts) { parts.values[23] = '\x40'; }, "over the weight's edge in step 1", layer(Stored::kFloat32));
  refused([](Parts& parts) { parts.indices[0] = '\x01'; }, "a position should be below 4, got 4", layer(Stored::kInt8));
  refused([](Parts& parts) { parts.indices[1] = '\x0E'; }, "a position should be below 4", layer(Stored::kInt8));
  refused(
      [](Parts& parts) {
        const float large = 3e38f;
        std::memcpy(parts.vectors.data(), &large, 4);
      },
      "a sparse weight should be finite", layer(Stored::kInt8));
  refused(
      [](Parts& parts) {
        parts.description = changed(parts.description, "\"codes\":4", "\"codes\":3");
        parts.indices[1] = '\x10';
      },
      "the last byte is not filled up with zeros", layer(Stored::kFloat32));
}

void test_files() {
  std::string folder = (std::filesystem::temp_directory_path() / "pykd_XXXXXX").string();
  if (!mkdtemp(folder.data())) return check(false, "a temporary folder");
  const std::string path = folder + "/a.pykd.safetensors",
                    good = testing::sealed(testing::every_operator(Stored::kInt8));
  const auto write = [&path](const std::string& content) { std::ofstream(path, std::ios::binary) << content; };
  const auto sentence = [](const std::string& file) -> std::string {
    try {
      read_model(file.c_str());
    } catch (const FormatError& error) {
      return error.what();
    }
    return "";
  };
  write(good);
  check(read_model(path.c_str()) == read(good).model, "a file is what its bytes are");
  write(good + "a");
  check(sentence(path).starts_with(path + " is no model file of pykd, or was damaged: its tensors end at byte") &&
            sentence(path).ends_with("; export it anew"),
        "a damaged file: " + sentence(path));
  check(sentence(folder + "/b") == "cannot read " + folder + "/b: No such file or directory", sentence(folder + "/b"));
  check(sentence(folder).find("is no model file: give a file") != std::string::npos, "a folder");
  check(sentence("/dev/zero").find("is no model file: give a file") != std::string::npos, "/dev/zero");
  check(mkfifo((folder + "/pipe").c_str(), 0600) == 0 &&
            sentence(folder + "/pipe").find("is no model file: give a file") != std::string::npos,
        "a pipe");
  check(truncate(path.c_str(), (off_t{4} << 30) + 1) == 0 &&
            sentence(path).find("give a file of at most 4294967296 bytes") != std::string::npos,
        "a file above 4 GiB");
  std::filesystem::remove_all(folder);
}

// Files whose few bytes say much; read() checks what they make the reader allocate.
void test_memory() {
  const auto with_step = [](const std::string& step) {
    testing::Writer writer(Stored::kFloat32);
    writer.add(step);
    return testing::sealed(writer.finish("\"shape\":[1]"));
  };
  std::string zeros = "0", keys, lists = "[]", tabs;
  for (int i = 0; i < 100'000; ++i) {
    zeros += ",0";
    keys += ",\"" + std::to_string(i) + "\":0";
    lists += ",[]";
    tabs += "\\t";
  }
  check(read(with_step("\"op\":\"concat\",\"in\":[" + zeros + "]")).sentence.empty(), "many inputs");
  check_refused(with_step("\"op\":\"relu\"" + keys), "relu has no option '0'");
  check_refused(with_step("\"op\":\"relu\",\"in\":[" + lists + "]"), "should read earlier values, got [[], [], ");
  check_refused(with_step("\"op\":\"" + tabs + "\""), "step 1 should be one of");
  check_refused(with_step("\"op\":\"relu\",\"in\":[" + std::string(300'000, '9') + "]"), "is not valid JSON");

  // A dense weight of 1 GiB, of which nothing is stored: with one code of 16 bits for 65,535 places it is short.
  testing::Writer writer(Stored::kFloat32);
  writer.add(R"("op":"linear","shape":[16384,16384],"bits":1,"codes":0,"bias":false)");
  const Answer large = read(testing::sealed(writer.finish("\"shape\":[16384]")));
  check(large.sentence.empty() && large.model.ops[0].weight.values.empty(), "a large weight without a block");
  Parts gaps = testing::one_layer(Stored::kFloat32, {1, 0, 0, 0}, 1, 1, {1, 1});
  gaps.indices = std::string(100'000, '\xFF') + '\x7F';  // 800,007 empty places, then a block
  testing::replace_all(gaps.description, "\"codes\":1", "\"codes\":800008");
  testing::replace_all(gaps.description, "[1,4]", "[1,800008]");
  testing::replace_all(gaps.description, "\"shape\":[4]", "\"shape\":[800008]");
  const Answer found = read(testing::sealed(gaps));
  check(found.sentence.empty() && found.model.ops[0].weight.positions == std::vector<int64_t>{800'007}, "a far block");
}

// ---- mutants -------------------------------------------------------------------------------------------------------

class Mutator {
 public:
  size_t below(size_t count) { return static_cast<size_t>(random_() % count); }

  template <typename List>
  const auto& one_of(const List& list) {
    return list[below(std::size(list))];
  }

  // One to three places in which bits are flipped, bytes set, cut out, copied from elsewhere, or words of JSON.
  void change(std::string& text) {
    static const std::string kWords[] = {"0", "1", "9", "-",   "[",    "]",    "{",        "}",  ",",       "\"",
                                         ":", ".", "e", "1e9", "null", "true", "16777216", "\\", "\\ud800", "[[[[[[[["};
    for (size_t count = 1 + below(3); count-- && !text.empty();) {
      const size_t at = below(text.size()), other = below(text.size());
      switch (below(7)) {
        case 0:
        case 1: text[at] = static_cast<char>(static_cast<unsigned char>(text[at]) ^ 1u << below(8)); break;
        case 2: text[at] = static_cast<char>(below(256)); break;
        case 3: text.erase(at, 1 + below(4)); break;
        case 4: text.insert(at, text.substr(other, 1 + below(40))); break;
        case 5: text.replace(at, below(4), one_of(kWords)); break;
        case 6:
          if (below(8) == 0) text.resize(at);
      }
    }
  }

  // Another number, or another value, in place of one in JSON.
  void change_number(std::string& text) {
    static const std::string kValues[] = {"0",
                                          "1",
                                          "2",
                                          "3",
                                          "7",
                                          "-1",
                                          "255",
                                          "65536",
                                          "16777216",
                                          "16777217",
                                          "1.0",
                                          "0.5",
                                          "1e30",
                                          "1e999",
                                          "9223372036854775807",
                                          "18446744073709551616",
                                          "2147483648",
                                          "4294967296",
                                          "268435457",
                                          "null",
                                          "true",
                                          "\"a\"",
                                          "[]",
                                          "[1,1]",
                                          "{}",
                                          "NaN"};
    size_t begin = text.find_first_of("0123456789", below(text.size()));
    if (begin == text.npos) return;
    const size_t end = text.find_first_not_of("0123456789.", begin);
    text.replace(begin, (end == text.npos ? text.size() : end) - begin, one_of(kValues));
  }

  // A piece between braces from one text in front of another's.
  void splice(std::string& text, const std::string& from) {
    const size_t begin = from.find('{', below(from.size())), end = from.find('}', begin);
    const size_t at = text.find('{', below(text.size()));
    if (begin == from.npos || end == from.npos || at == text.npos) return;
    text.insert(at, from.substr(begin, end - begin + 1) + ",");
  }

 private:
  std::mt19937_64 random_{1};
};

std::string mutant(Mutator& mutator, const std::vector<Parts>& samples) {
  Parts parts = mutator.one_of(samples);
  std::string* tensors[] = {&parts.vectors, &parts.values, &parts.indices};
  const size_t way = mutator.below(16);
  if (way < 4) {
    mutator.change(parts.description);
  } else if (way < 8) {
    for (size_t count = 1 + mutator.below(2); count--;) mutator.change_number(parts.description);
  } else if (way < 11) {
    mutator.change(*mutator.one_of(tensors));
  } else if (way < 12) {
    mutator.splice(parts.description, mutator.one_of(samples).description);
  } else if (way < 13) {
    const Parts& other = mutator.one_of(samples);
    (mutator.below(2) ? parts.values : parts.indices) = mutator.below(2) ? other.values : other.indices;
  } else if (way < 15) {
    std::string entries = testing::entries_of(parts);
    mutator.below(2) ? mutator.change(entries) : mutator.change_number(entries);
    return testing::sealed(parts, entries);
  }
  std::string file = testing::sealed(parts);
  if (way == 15) {
    if (mutator.below(4) == 0) {
      file.replace(
          0, 8, testing::little_endian(mutator.below(2) ? mutator.below(3000) : ~uint64_t{0} >> mutator.below(64), 8));
    } else {
      mutator.change(file);
    }
  }
  return file;
}

void test_mutants() {
  const int count = testing::kSlow ? 10'000 : 100'000;
  const std::vector<Parts> samples = testing::samples();
  Mutator mutator;
  int accepted = 0, refused = 0, bad = 0;
  for (int i = 0; i < count; ++i) {
    const std::string file = mutant(mutator, samples);
    const Answer answer = read(file);
    (answer.sentence.empty() ? accepted : refused)++;
    if (answer.sentence.size() >= 400 || answer.sentence.find('\n') != answer.sentence.npos) ++bad;
    if (i % 4 == 0 && !(read(file) == answer)) ++bad;
  }
  check(bad == 0, std::to_string(bad) + " mutants are read in two ways, or refused at length");
  check(accepted > count / 100 && refused > count / 2, "some mutants are accepted, most are refused");
  std::printf("%d mutants: %d accepted, %d refused; at most %.1f bytes allocated for one of a file\n", count, accepted,
              refused, most_allocated);
}

}  // namespace

int main() {
  test_hash();
  test_every_operator();
  test_weights();
  test_gaps();
  test_half();
  test_bad_descriptions();
  test_bad_headers();
  test_bad_tensors();
  test_files();
  test_memory();
  test_mutants();
  return pykd::testing::report();
}
