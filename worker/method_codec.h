// Method, from the wire's message to the struct of the kernels. What is not served is reported with
// every reason at once.
#pragma once

#include <string>
#include <vector>

#include "absl/strings/string_view.h"

#include "longspan/v1/method.pb.h"

#include "base/status.h"
#include "kernels/method.h"
#include "worker/findings.h"

namespace longspan {

// `path` is the field that holds the message. The result is meaningful when nothing was found.
Method decode_method(const v1::Method& message, absl::string_view path, Findings& findings);

// kernels' dense_method() as a message.
v1::Method encode_dense_method();

// The methods of a directory: every *.txtpb, ordered by name. INVALID_ARGUMENT names the file, and
// the line that does not parse.
StatusOr<std::vector<v1::Method>> load_methods(const std::string& directory);

}  // namespace longspan
