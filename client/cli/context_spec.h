// The options that describe a context, shared by `context create`, `methods check` and `bench`.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <CLI/App.hpp>

#include "longspan/v1/context.pb.h"

#include "base/data_type.h"
#include "client/cli/invocation.h"

namespace longspan::cli {

struct SpecOptions {
  uint32_t layers = 1;
  uint32_t query_heads = 8;
  uint32_t kv_heads = 2;
  uint32_t head_dim = 64;
  uint32_t value_head_dim = 0;
  std::string kv_dtype = "bf16";
  std::vector<std::string> methods;  // names or files
  std::string default_method;
  double scale = 0;
  double soft_cap = 0;
  std::string layout = "block_cyclic";
  uint32_t stripe_tokens = 0;
  uint64_t max_tokens = 0;
  double ttl_seconds = 0;
  std::vector<std::string> labels;  // key=value
  std::string model_fingerprint;

  uint32_t value_dim() const { return value_head_dim == 0 ? head_dim : value_head_dim; }
};

// Adds the shape options; `required`: the shape has no defaults.
void add_shape_options(CLI::App& command,
                       SpecOptions& options,
                       Invocation& invocation,
                       bool required);
// Adds everything else but the methods.
void add_placement_options(CLI::App& command, SpecOptions& options, Invocation& invocation);
CLI::Option* add_method_option(CLI::App& command, SpecOptions& options, Invocation& invocation);

DataType cache_type(const SpecOptions& options);

// Names are looked up at the server, and files (a path, or anything that ends in .txtpb) are read.
StatusOr<v1::Method> resolve_method(client::Client& client, const std::string& name_or_file);
StatusOr<v1::Method> read_method_file(const std::string& path);

StatusOr<v1::ContextSpec> make_spec(client::Client& client, const SpecOptions& options);

// What a call that names no method uses.
std::string default_method_name(const v1::ContextSpec& spec);

// Whether calls must bring gates, or search queries.
bool needs_gates(const v1::Method& method);
bool needs_search_query(const v1::Method& method);

}  // namespace longspan::cli
