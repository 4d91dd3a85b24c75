// ContextSpec, from the wire to the shape that a group keeps; every reason against it at once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "longspan/v1/context.pb.h"
#include "longspan/v1/server.pb.h"

#include "kernels/backend.h"
#include "worker/findings.h"
#include "worker/group.h"

namespace longspan {

// What a server takes.
struct ServerTerms {
  v1::Limits limits;
  int num_ranks = 1;
  // Asked for `supports` only, which any thread may call.
  const Backend* backend = nullptr;
};

struct DecodedSpec {
  ContextShape shape;
  size_t default_method = 0;
};

// The result is meaningful when nothing was found.
DecodedSpec decode_spec(const v1::ContextSpec& message,
                        const ServerTerms& terms,
                        Findings& findings);

// The spec with everything that the caller left to the server filled in.
v1::ContextSpec effective_spec(const v1::ContextSpec& message, const DecodedSpec& decoded);

// OK, or why the backend declines the method for heads and types like these.
Status check_support(const Backend& backend, const ContextShape& shape, const Method& method);

// Bytes a token over all layers and ranks.
int64_t kv_bytes_per_token(const ContextShape& shape);
double summary_bytes_per_token(const ContextShape& shape);

}  // namespace longspan
