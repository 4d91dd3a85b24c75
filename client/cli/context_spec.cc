#include "client/cli/context_spec.h"

#include <fstream>
#include <sstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/text_format.h>
#include <google/protobuf/util/time_util.h>

namespace longspan::cli {
namespace {

// Keeps the first complaint of the text parser, with its place.
class FirstError : public google::protobuf::io::ErrorCollector {
 public:
  void AddError(int line, int column, const std::string& message) override {
    if (text_.empty()) {
      text_ = absl::StrCat(line + 1, ":", column + 1, ": ", message);
    }
  }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

bool is_file_name(const std::string& text) {
  return absl::EndsWith(text, ".txtpb") || absl::StrContains(text, "/");
}

std::string stem(const std::string& path) {
  const size_t begin = path.rfind('/') == std::string::npos ? 0 : path.rfind('/') + 1;
  const size_t dot = path.rfind('.');
  return path.substr(begin, dot == std::string::npos || dot < begin ? dot : dot - begin);
}

v1::Layout::Kind layout_kind(const std::string& name) {
  if (name == "contiguous") {
    return v1::Layout::KIND_CONTIGUOUS;
  }
  return name == "zigzag" ? v1::Layout::KIND_ZIGZAG : v1::Layout::KIND_BLOCK_CYCLIC;
}

}  // namespace

void add_shape_options(CLI::App& command,
                       SpecOptions& options,
                       Invocation& invocation,
                       bool required) {
  const auto add = [&](const char* flag, uint32_t& target, const char* help) {
    CLI::Option* option = command.add_option(flag, target, help)->group("Shape");
    if (required) {
      option->required();
    } else {
      option->capture_default_str();
    }
  };
  add("--layers", options.layers, "layers of the model");
  add("--query-heads", options.query_heads, "query heads of a layer");
  add("--kv-heads", options.kv_heads, "key-value heads of a layer; divides the query heads");
  add("--head-dim", options.head_dim, "size of a query and key head");
  command
      .add_option("--value-head-dim", options.value_head_dim, "size of a value head, if another")
      ->group("Shape");
  CLI::Option* dtype = command.add_option("--kv-dtype", options.kv_dtype, "type of the cache")
                           ->capture_default_str()
                           ->group("Shape");
  limit_to(invocation, dtype, {"bf16", "fp16", "fp32"});
}

void add_placement_options(CLI::App& command, SpecOptions& options, Invocation& invocation) {
  command.add_option("--scale", options.scale, "of the scores; 0: 1 / sqrt(head size)");
  command.add_option("--soft-cap", options.soft_cap, "of the scores; 0: none");
  CLI::Option* layout =
      command.add_option("--layout", options.layout, "which rank owns which tokens")
          ->capture_default_str();
  limit_to(invocation, layout, {"block_cyclic", "contiguous", "zigzag"});
  command.add_option("--stripe-tokens", options.stripe_tokens, "0: the server's choice");
  command.add_option("--max-tokens", options.max_tokens, "bound of the length; 0: the server's")
      ->check(whole_number());
  command.add_option("--ttl",
                     options.ttl_seconds,
                     "seconds without any call after which the context expires; 0: never");
  command.add_option("--label", options.labels, "NAME=VALUE; may be repeated");
  command.add_option("--model-fingerprint",
                     options.model_fingerprint,
                     "compared when the context is created again");
}

CLI::Option* add_method_option(CLI::App& command, SpecOptions& options, Invocation& invocation) {
  CLI::Option* option = command.add_option(
      "--method", options.methods, "a method's name, or a .txtpb file; may be repeated");
  complete_method_names(invocation, option);
  return option;
}

DataType cache_type(const SpecOptions& options) {
  if (options.kv_dtype == "fp32") {
    return DataType::kFloat32;
  }
  return options.kv_dtype == "fp16" ? DataType::kFloat16 : DataType::kBFloat16;
}

StatusOr<v1::Method> read_method_file(const std::string& path) {
  const std::ifstream file(path);
  if (!file) {
    return absl::InvalidArgumentError(absl::StrCat("cannot read ", path));
  }
  std::stringstream text;
  text << file.rdbuf();
  v1::Method method;
  FirstError error;
  google::protobuf::TextFormat::Parser parser;
  parser.RecordErrorsTo(&error);
  if (!parser.ParseFromString(text.str(), &method)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ":", error.text()));
  }
  if (method.name().empty()) {
    method.set_name(stem(path));
  }
  return method;
}

StatusOr<v1::Method> resolve_method(client::Client& client, const std::string& name_or_file) {
  if (is_file_name(name_or_file)) {
    return read_method_file(name_or_file);
  }
  LONGSPAN_ASSIGN_OR_RETURN(const auto capabilities, client.capabilities());
  std::string known;
  for (const v1::Method& method : capabilities.methods()) {
    if (method.name() == name_or_file) {
      return method;
    }
    absl::StrAppend(&known, known.empty() ? "" : ", ", method.name());
  }
  return absl::NotFoundError(absl::StrCat("the server ships no method `",
                                          name_or_file,
                                          "`; it ships ",
                                          known.empty() ? "none" : known));
}

StatusOr<v1::ContextSpec> make_spec(client::Client& client, const SpecOptions& options) {
  v1::ContextSpec spec;
  spec.set_model_fingerprint(options.model_fingerprint);
  spec.set_num_layers(options.layers);
  spec.set_num_query_heads(options.query_heads);
  spec.set_num_kv_heads(options.kv_heads);
  spec.set_key_head_dim(options.head_dim);
  spec.set_value_head_dim(options.value_head_dim);
  spec.set_kv_dtype(client::to_wire(cache_type(options)));
  spec.set_scale(options.scale);
  spec.set_logit_soft_cap(options.soft_cap);
  for (const std::string& name : options.methods) {
    LONGSPAN_ASSIGN_OR_RETURN(*spec.add_methods(), resolve_method(client, name));
  }
  spec.set_default_method(options.default_method);
  spec.mutable_layout()->set_kind(layout_kind(options.layout));
  spec.mutable_layout()->set_stripe_tokens(options.stripe_tokens);
  spec.set_max_tokens(options.max_tokens);
  if (options.ttl_seconds > 0) {
    *spec.mutable_ttl() = google::protobuf::util::TimeUtil::MillisecondsToDuration(
        static_cast<int64_t>(options.ttl_seconds * 1e3));
  }
  for (const std::string& label : options.labels) {
    const size_t equals = label.find('=');
    if (equals == std::string::npos || equals == 0) {
      return absl::InvalidArgumentError(absl::StrCat("--label ", label, ": must be NAME=VALUE"));
    }
    (*spec.mutable_labels())[label.substr(0, equals)] = label.substr(equals + 1);
  }
  return spec;
}

std::string default_method_name(const v1::ContextSpec& spec) {
  if (!spec.default_method().empty()) {
    return spec.default_method();
  }
  return spec.methods().empty() ? "dense" : spec.methods(0).name();
}

bool needs_gates(const v1::Method& method) {
  return method.merge().kind() == v1::Merge::KIND_GATES;
}

bool needs_search_query(const v1::Method& method) {
  for (const v1::Branch& branch : method.branches()) {
    if (branch.search().query() == v1::Search::QUERY_SUPPLIED) {
      return true;
    }
  }
  return false;
}

}  // namespace longspan::cli
