// What TensorRT's trtexec prints, read trusting nothing: logs of TensorRT 7 to 11.
#pragma once

#include <limits>
#include <string>

namespace pykd::runtime {

struct TrtexecResult {
  struct Line {  // milliseconds; NaN: not said
    static constexpr double kUnsaid = std::numeric_limits<double>::quiet_NaN();
    double min = kUnsaid, max = kUnsaid, mean = kUnsaid, median = kUnsaid, p90 = kUnsaid, p95 = kUnsaid, p99 = kUnsaid;
  };
  double throughput = 0;  // queries a second; 0: not said
  Line latency;           // of a query with its transfers
  Line gpu_compute;       // of its kernels alone
  std::string version;    // "10.3.0"; "": not said
};

// Of a log with several summaries the last one counts. Throws FormatError where trtexec failed or the log holds no
// figures; a figure that is cut off, negative or not finite is not said.
TrtexecResult parse_trtexec(const std::string& text);

}  // namespace pykd::runtime
