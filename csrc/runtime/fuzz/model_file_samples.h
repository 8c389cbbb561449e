// Model files for the test and the fuzz target: samples in parts, and parts put together under hashes that are right,
// so that what was changed in a part gets past them.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "runtime/model_file.h"
#include "runtime/sha256.h"

namespace pykd::testing {

constexpr std::array<const char*, 4> kItemNames = {"F32", "F16", "BF16", "I8"},
                                     kValueNames = {"float32", "float16", "bfloat16", "int8"};
constexpr std::array<size_t, 4> kValueBytes = {4, 2, 2, 1};

struct Parts {
  runtime::Stored stored = runtime::Stored::kFloat32;
  std::string description;  // with @vectors, @values and @indices for the tensors' SHA-256
  std::string vectors, values, indices;
};

inline void replace_all(std::string& text, std::string_view from, std::string_view to) {
  for (size_t at = 0; (at = text.find(from, at)) != text.npos; at += to.size()) text.replace(at, from.size(), to);
}

inline std::string little_endian(uint64_t number, size_t bytes) {
  std::string text;
  for (size_t i = 0; i < bytes; ++i) text += static_cast<char>(number >> 8 * i & 255);
  return text;
}

// The header's entries of the tensors, each with a comma behind it.
inline std::string entries_of(const Parts& parts) {
  std::string entries;
  size_t end = 0;
  const auto type = static_cast<size_t>(parts.stored);
  const auto add = [&](const char* name, const char* dtype, const std::string& tensor, size_t item) {
    if (tensor.empty()) return;
    const size_t begin = end;
    end += tensor.size();
    entries += std::string("\"") + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":[" +
               std::to_string(tensor.size() / item) + "],\"data_offsets\":[" + std::to_string(begin) + "," +
               std::to_string(end) + "]},";
  };
  add("vectors", "F32", parts.vectors, 4);
  add("values", kItemNames[type], parts.values, kValueBytes[type]);
  add("indices", "U8", parts.indices, 1);
  return entries;
}

// The file, its hashes filled in.
inline std::string sealed(const Parts& parts, const std::string& entries) {
  std::string description = parts.description;
  const auto hash = [](const std::string& bytes) { return runtime::sha256(bytes.data(), bytes.size()); };
  replace_all(description, "@vectors", hash(parts.vectors));
  replace_all(description, "@values", hash(parts.values));
  replace_all(description, "@indices", hash(parts.indices));
  std::string header = "{" + entries + "\"__metadata__\":{\"sha256\":\"" + hash(description) + "\",\"pykd\":\"";
  for (const char each : description) {
    const auto byte = static_cast<unsigned char>(each);
    if (byte < 0x20) {
      header += std::string("\\u00") + "01"[byte >> 4] + "0123456789abcdef"[byte & 15];
    } else {
      if (each == '"' || each == '\\') header += '\\';
      header += each;
    }
  }
  header += "\"}}";
  return little_endian(header.size(), 8) + header + parts.vectors + parts.values + parts.indices;
}

inline std::string sealed(const Parts& parts) { return sealed(parts, entries_of(parts)); }

// The codes of ascending positions: their number, and their bytes.
inline std::pair<int64_t, std::string> encoded(const std::vector<int64_t>& positions, int bits) {
  const int64_t escape = (int64_t{1} << bits) - 1;
  std::vector<int64_t> codes;
  int64_t place = 0;
  for (const int64_t position : positions) {
    for (; position - place >= escape; place += escape) codes.push_back(escape);
    codes.push_back(position - place);
    place = position + 1;
  }
  std::string bytes((codes.size() * static_cast<size_t>(bits) + 7) / 8, '\0');
  size_t at = 0;
  for (const int64_t code : codes) {
    for (int bit = 0; bit < bits; ++bit, ++at) {
      if (code >> bit & 1) bytes[at / 8] = static_cast<char>(static_cast<unsigned char>(bytes[at / 8]) | 1u << at % 8);
    }
  }
  return {static_cast<int64_t>(codes.size()), bytes};
}

// Writes a file of one step after the other. Weights are multiples of 1/4 up to 3, which every type of values holds.
class Writer {
 public:
  explicit Writer(runtime::Stored stored) { parts_.stored = stored; }

  void add(const std::string& step) { steps_ += (steps_.empty() ? "{" : ",{") + step + "}"; }

  void add_vector(const std::vector<float>& vector) {
    for (const float value : vector) parts_.vectors += little_endian(std::bit_cast<uint32_t>(value), 4);
  }

  void add_value(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    switch (parts_.stored) {
      case runtime::Stored::kFloat32: parts_.values += little_endian(bits, 4); break;
      case runtime::Stored::kBFloat16: parts_.values += little_endian(bits >> 16, 2); break;
      case runtime::Stored::kInt8: parts_.values += static_cast<char>(static_cast<int>(value * 4)); break;
      case runtime::Stored::kFloat16:
        const uint32_t size = (bits & 0x7FFFFFFF) >> 13, sign = bits >> 16 & 0x8000;
        parts_.values += little_endian(sign | (size ? size - (112u << 10) : 0), 2);
    }
  }

  // A layer over the matrix [rows, columns]; bits 0 stores it dense. `more` are its options, each with a comma before
  // it.
  void add_layer(const std::string& kind, const std::vector<int64_t>& shape, const std::vector<float>& matrix, int bits,
                 std::array<int64_t, 2> block, const std::vector<float>& bias, const std::string& more = "") {
    const int64_t rows = shape[0], columns = static_cast<int64_t>(matrix.size()) / rows;
    std::string step = "\"op\":\"" + kind + "\",\"shape\":[";
    for (const int64_t side : shape) step += (step.back() == '[' ? "" : ",") + std::to_string(side);
    step += "],\"block\":[" + std::to_string(block[0]) + "," + std::to_string(block[1]) + "]" + more;
    if (parts_.stored == runtime::Stored::kInt8) add_vector(std::vector<float>(static_cast<size_t>(rows), 0.25f));
    if (bits) {
      const int64_t across = (columns + block[1] - 1) / block[1];
      std::vector<int64_t> positions;
      for (int64_t place = 0; place < (rows + block[0] - 1) / block[0] * across; ++place) {
        std::vector<float> values;
        bool stored = false;
        for (int64_t row = place / across * block[0], i = 0; i < block[0]; ++i, ++row) {
          for (int64_t column = place % across * block[1], j = 0; j < block[1]; ++j, ++column) {
            values.push_back(row < rows && column < columns ? matrix[static_cast<size_t>(row * columns + column)] : 0);
            stored = stored || values.back() != 0;
          }
        }
        if (!stored) continue;
        positions.push_back(place);
        for (const float value : values) add_value(value);
      }
      const auto [codes, bytes] = encoded(positions, bits);
      parts_.indices += bytes;
      step += ",\"bits\":" + std::to_string(bits) + ",\"codes\":" + std::to_string(codes);
    } else {
      for (const float value : matrix) add_value(value);
    }
    if (bias.empty()) step += ",\"bias\":false";
    add_vector(bias);
    add(step);
  }

  Parts finish(const std::string& input, const std::string& classes = "") {
    std::string hashes;
    const auto add_hash = [&hashes](const std::string& name, const std::string& tensor) {
      if (!tensor.empty()) hashes += (hashes.empty() ? "\"" : ",\"") + name + "\":\"@" + name + "\"";
    };
    add_hash("vectors", parts_.vectors);
    add_hash("values", parts_.values);
    add_hash("indices", parts_.indices);
    parts_.description = "{\"version\":1,\"input\":{" + input + ",\"dtype\":\"float32\"},\"values\":\"" +
                         kValueNames[static_cast<size_t>(parts_.stored)] + "\",\"ops\":[" + steps_ + "],\"classes\":[" +
                         classes + "],\"sha256\":{" + hashes +
                         "},\"provenance\":{\"method\":\"none\",\"seed\":-3},\"licence\":\"CC0-1.0\"}";
    return parts_;
  }

 private:
  Parts parts_;
  std::string steps_;
};

// Multiples of 1/4 up to 3, about one of `every` not zero.
inline std::vector<float> matrix(int64_t entries, uint32_t every) {
  std::vector<float> values;
  uint32_t state = 1;
  for (int64_t i = 0; i < entries; ++i) {
    state = state * 1664525 + 1013904223;
    const float value = static_cast<float>(state >> 8 & 7) / 4 + 1;
    values.push_back((state >> 20) % every ? 0 : state >> 11 & 1 ? -value : value);
  }
  return values;
}

// A network of every operator, as in tests/deploy/test_model_file.py.
inline Parts every_operator(runtime::Stored stored) {
  Writer writer(stored);
  writer.add_vector({0.5, -2, 1, 0.25});
  writer.add(R"("op":"affine")");
  writer.add_layer("conv2d", {6, 2, 3, 3}, matrix(108, 4), 3, {1, 1}, {1, 2, 3, 4, 5, 6},
                   R"(,"stride":[2,1],"padding":[1,0])");
  writer.add(R"("op":"leaky_relu","slope":0.125)");
  writer.add(R"("op":"max_pool2d","kernel":[2,2],"ceil":true)");
  writer.add_layer("conv2d", {6, 1, 1, 1}, matrix(6, 1), 0, {1, 1}, {}, R"(,"groups":6)");
  writer.add(R"("op":"add","in":[5,4])");
  writer.add(R"("op":"tanh")");
  writer.add(R"("op":"concat","in":[7,5])");
  writer.add(R"("op":"avg_pool2d","kernel":[3,3],"stride":[1,1],"padding":[1,1],"count_padding":false)");
  writer.add(R"("op":"global_avg_pool")");
  writer.add(R"("op":"flatten")");
  writer.add_layer("linear", {10, 12}, matrix(120, 16), 2, {4, 5}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9});
  writer.add(R"("op":"relu")");
  writer.add_layer("linear", {3, 10}, matrix(30, 99999), 1, {1, 1}, {});
  writer.add(R"("op":"softmax")");
  return writer.finish(R"("shape":[2,9,9],"mean":[0.5,0.25],"std":[1,0.125])", R"("a","b","\u00e7")");
}

// One layer, whose grid of 1 x 1 or larger blocks is coded with so many bits.
inline Parts one_layer(runtime::Stored stored, const std::vector<float>& values, int64_t rows, int bits,
                       std::array<int64_t, 2> block) {
  Writer writer(stored);
  const int64_t columns = static_cast<int64_t>(values.size()) / rows;
  writer.add_layer("linear", {rows, columns}, values, bits, block, std::vector<float>(static_cast<size_t>(rows), 1.5f));
  return writer.finish("\"shape\":[" + std::to_string(columns) + "]");
}

inline std::vector<Parts> samples() {
  std::vector<Parts> found;
  for (size_t type = 0; type < 4; ++type) {
    const auto stored = static_cast<runtime::Stored>(type);
    found.push_back(every_operator(stored));
    found.push_back(one_layer(stored, matrix(63, 3), 7, 1 + static_cast<int>(type), {2, 4}));
  }
  return found;
}

// The fuzz target's input: a 1 and the type of values, the lengths of the tensors in two bytes each, the tensors, the
// description; or a 0 and a whole file.
inline std::string fuzz_input(const Parts& parts) {
  std::string input(1, static_cast<char>(static_cast<int>(parts.stored) * 2 + 1));
  for (const auto* tensor : {&parts.vectors, &parts.values, &parts.indices}) input += little_endian(tensor->size(), 2);
  return input + parts.vectors + parts.values + parts.indices + parts.description;
}

}  // namespace pykd::testing
