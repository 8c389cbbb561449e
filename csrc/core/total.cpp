#include "core/total.h"

namespace pykd {
namespace {

template <typename T>
void total(const void* row_loss, int64_t rows, double scale, void* loss) {
  double sum = 0;
  for (int64_t row = 0; row < rows; ++row) sum += static_cast<const T*>(row_loss)[row];
  *static_cast<T*>(loss) = static_cast<T>(scale * sum);
}

}  // namespace

void total_cpu(const void* row_loss, DType dtype, int64_t rows, double scale, void* loss) {
  (dtype == DType::kFloat64 ? total<double> : total<float>)(row_loss, rows, scale, loss);
}

}  // namespace pykd
