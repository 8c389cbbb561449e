// Which number of lanes, which forms of the weights, and which steps the threads share.
#pragma once

#include <memory>
#include <vector>

#include "runtime/engine.h"
#include "runtime/program.h"

namespace pykd::runtime {

struct Planned {
  Program program;
  std::vector<Choice> choices;
};

// pool: of options.threads threads, or null for one. Throws as Plan does.
Planned make_plan(const std::shared_ptr<const Network>& network, const PlanOptions& options, ThreadPool* pool);

}  // namespace pykd::runtime
