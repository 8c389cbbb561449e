// Calls of pykd's operators through torch's dispatcher.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>

namespace pykd::glue {

template <typename Signature>
auto find(const std::string& name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("pykd::" + name).c_str(), overload).typed<Signature>();
}

}  // namespace pykd::glue
