#include "runtime/rows.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "runtime/file.h"
#include "runtime/image.h"
#include "runtime/npy.h"

namespace pykd::runtime {
namespace {

constexpr int64_t kLargest = int64_t{4} << 30;  // bytes of a file

Rows read_array(const Bytes& bytes, const std::vector<int64_t>& row) {
  const Array array = parse_npy(bytes.data.get(), bytes.size);
  Rows rows;
  if (array.shape == row) {
    rows.count = 1;
  } else if (array.shape.size() == row.size() + 1 && std::equal(row.begin(), row.end(), array.shape.begin() + 1)) {
    rows.count = array.shape[0];
  } else {
    throw FormatError("its shape is " + text(array.shape) + ", the network takes " + text(row) +
                      " or a batch of such rows");
  }
  if (array.pixels) {
    rows.pixels.assign(array.elements, array.elements + array.count);
  } else {
    rows.floats.resize(static_cast<size_t>(array.count));
    if (array.count) std::memcpy(rows.floats.data(), array.elements, rows.floats.size() * sizeof(float));
  }
  return rows;
}

Rows read_picture(const Bytes& bytes, const std::vector<int64_t>& row) {
  const Image image = parse_image(bytes.data.get(), bytes.size);
  const std::vector<int64_t> shape = {image.channels, image.height, image.width};
  const bool takes = row.size() == 3 && (row[0] == 1 || row[0] == 3) && row[1] == image.height && row[2] == image.width;
  if (!takes) throw FormatError("it is an image " + text(shape) + ", the network takes " + text(row));
  return {1, {}, with_channels(image, row[0]).pixels};
}

// Calls read(), and names the file in what it throws.
template <typename Read>
auto named(const std::string& path, const Read& read) {
  try {
    return read();
  } catch (const FormatError& error) {
    throw FormatError(path + ": " + error.what());
  }
}

}  // namespace

Rows read_rows(const std::string& path, const Model& model) {
  const Bytes bytes = read_file(path, kLargest, "image or array");
  return named(path, [&] {
    const bool array = bytes.size > 0 && bytes.data[0] == 0x93;
    Rows rows = array ? read_array(bytes, model.input_shape) : read_picture(bytes, model.input_shape);
    if (!rows.pixels.empty() && model.mean.empty())
      throw FormatError("the network does not say what pixels mean (mean and std): give an .npy file of float32");
    return rows;
  });
}

std::vector<float> answers(const std::shared_ptr<const Network>& network, const Rows& rows,
                           const PlanOptions& options) {
  Plan plan(network, options);
  const auto in = static_cast<size_t>(product(model(*network).input_shape));
  const auto out = static_cast<size_t>(product(output_shape(*network)));
  std::vector<float> answers(static_cast<size_t>(rows.count) * out), last(static_cast<size_t>(options.batch) * out);
  const auto run = [&](const auto& all) {
    auto some = all;
    for (int64_t row = 0; row < rows.count; row += options.batch) {
      const int64_t n = std::min(options.batch, rows.count - row);
      const size_t begin = static_cast<size_t>(row) * in, count = static_cast<size_t>(n) * in;
      some.assign(static_cast<size_t>(options.batch) * in, 0);
      std::copy_n(all.begin() + static_cast<std::ptrdiff_t>(begin), count, some.begin());
      plan.run(some.data(), last.data());
      std::copy_n(last.begin(), static_cast<size_t>(n) * out,
                  answers.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(row) * out));
    }
  };
  rows.pixels.empty() ? run(rows.floats) : run(rows.pixels);
  return answers;
}

std::vector<float> read_answers(const std::string& path, const Network& network, int64_t rows) {
  const Bytes bytes = read_file(path, kLargest, "array");
  return named(path, [&] {
    if (rows == 0) throw FormatError("the input has no rows whose answers could be checked");
    const Array array = parse_npy(bytes.data.get(), bytes.size);
    std::vector<int64_t> wanted = output_shape(network);
    wanted.insert(wanted.begin(), rows);
    if (array.pixels || array.shape != wanted)
      throw FormatError("its shape is " + text(array.shape) + ", the answers to the input are float32 " + text(wanted));
    std::vector<float> recorded(static_cast<size_t>(array.count));
    if (array.count) std::memcpy(recorded.data(), array.elements, recorded.size() * sizeof(float));
    return recorded;
  });
}

Check compare(const std::vector<float>& answers, const std::vector<float>& recorded, int64_t rows,
              Precision precision) {
  // A sum of n products errs by some sqrt(n) roundings of its largest one; that is 1e-5 for 30,000 of them in float32,
  // and a few layers, whose sums may each come in another order, make 1e-4. In half precision it is the weights and the
  // layers' inputs that are rounded, by 2^-11 or 2^-8: 32 of those allow for as many layers.
  const double tolerance = precision == Precision::kFloat32 ? 1e-4 : precision == Precision::kFloat16 ? 0x1p-6 : 0x1p-3;
  double largest = 0, difference = 0;
  for (size_t i = 0; i < recorded.size(); ++i) {
    const auto a = static_cast<double>(answers[i]), b = static_cast<double>(recorded[i]);
    if (std::isfinite(b)) largest = std::max(largest, std::abs(b));
    if (a == b || (std::isnan(a) && std::isnan(b))) continue;
    const double apart = std::isfinite(a) && std::isfinite(b) ? std::abs(a - b) : NAN;
    difference = std::isnan(apart) || apart > difference ? apart : difference;
    if (std::isnan(difference)) break;
  }
  return {rows, difference == 0 ? 0 : difference / largest, tolerance};
}

std::string line(const Check& check) {
  char text[160];
  std::snprintf(text, sizeof text, "%lld rows: largest difference %.3g of the largest answer, tolerance %.3g: %s",
                static_cast<long long>(check.rows), check.largest_difference, check.tolerance,
                check.equal() ? "equal" : "NOT EQUAL");
  return text;
}

}  // namespace pykd::runtime
