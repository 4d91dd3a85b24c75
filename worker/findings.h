// Everything that is wrong with a request, collected, so that a caller mends it in one go.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

#include "base/error_details.h"
#include "base/status.h"

namespace longspan {

struct Findings {
  std::vector<FieldError> invalid;
  std::vector<FieldError> unserved;

  void add_invalid(absl::string_view field, absl::string_view description) {
    invalid.push_back({std::string(field), std::string(description)});
  }
  void add_unserved(absl::string_view field, absl::string_view description) {
    unserved.push_back({std::string(field), std::string(description)});
  }
  bool empty() const { return invalid.empty() && unserved.empty(); }
  // What is wrong comes before what is not served.
  Status status() const {
    return invalid.empty() ? unimplemented(unserved) : invalid_argument(invalid);
  }
};

// "parent.child", or "child" at the root.
inline std::string field_path(absl::string_view parent, absl::string_view child) {
  return parent.empty() ? std::string(child) : absl::StrCat(parent, ".", child);
}

}  // namespace longspan
