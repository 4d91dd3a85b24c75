#include "kernels/backend.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

#ifdef LONGSPAN_CUDA
#include "kernels/cuda/backend.h"
#endif
#include "kernels/reference/backend.h"
#include "kernels/simd/backend.h"

namespace longspan {
namespace {

struct Entry {
  std::string_view name;
  std::unique_ptr<Backend> (*make)(const BackendOptions& options);
};

constexpr Entry kBackends[] = {
    {"simd", make_simd_backend},
    {"reference", make_reference_backend},
#ifdef LONGSPAN_CUDA
    {"cuda", make_cuda_backend},
#endif
};

}  // namespace

std::vector<std::string> backend_names() {
  std::vector<std::string> names;
  for (const Entry& entry : kBackends) {
    names.emplace_back(entry.name);
  }
  return names;
}

StatusOr<std::unique_ptr<Backend>> make_backend(std::string_view name,
                                                const BackendOptions& options) {
  if (options.num_threads < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_threads: must be at least 1, got ", options.num_threads));
  }
  for (const Entry& entry : kBackends) {
    if (entry.name == name) {
      return entry.make(options);
    }
  }
  return absl::NotFoundError(absl::StrCat("backend: no \"",
                                          std::string(name),
                                          "\" in this build, it has ",
                                          absl::StrJoin(backend_names(), ", ")));
}

}  // namespace longspan
