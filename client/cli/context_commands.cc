// `longspan context`: the life cycle of contexts.
#include <memory>
#include <utility>

#include <google/protobuf/util/time_util.h>

#include "client/cli/commands.h"
#include "client/cli/context_spec.h"
#include "client/cli/text.h"

namespace longspan::cli {
namespace {

using google::protobuf::util::TimeUtil;
using Json = nlohmann::ordered_json;

std::string dtype_name(v1::DataType type) {
  switch (type) {
    case v1::DATA_TYPE_FP32:
      return "fp32";
    case v1::DATA_TYPE_FP16:
      return "fp16";
    case v1::DATA_TYPE_FP8_E4M3:
      return "fp8_e4m3";
    case v1::DATA_TYPE_FP8_E5M2:
      return "fp8_e5m2";
    default:
      return "bf16";
  }
}

std::string layout_name(v1::Layout::Kind kind) {
  switch (kind) {
    case v1::Layout::KIND_CONTIGUOUS:
      return "contiguous";
    case v1::Layout::KIND_ZIGZAG:
      return "zigzag";
    default:
      return "block_cyclic";
  }
}

std::vector<std::string> method_names(const v1::ContextSpec& spec) {
  std::vector<std::string> names;
  for (const v1::Method& method : spec.methods()) {
    names.push_back(method.name());
  }
  return names;
}

uint32_t value_dim(const v1::ContextSpec& spec) {
  return spec.value_head_dim() == 0 ? spec.key_head_dim() : spec.value_head_dim();
}

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) {
    text += (text.empty() ? "" : ", ") + word;
  }
  return text;
}

Json spec_json(const v1::ContextSpec& spec) {
  Json json;
  json["num_layers"] = spec.num_layers();
  json["num_query_heads"] = spec.num_query_heads();
  json["num_kv_heads"] = spec.num_kv_heads();
  json["key_head_dim"] = spec.key_head_dim();
  json["value_head_dim"] = value_dim(spec);
  json["kv_dtype"] = dtype_name(spec.kv_dtype());
  json["scale"] = spec.scale();
  json["logit_soft_cap"] = spec.logit_soft_cap();
  json["methods"] = method_names(spec);
  json["default_method"] = default_method_name(spec);
  json["layout"] = {{"kind", layout_name(spec.layout().kind())},
                    {"stripe_tokens", spec.layout().stripe_tokens()}};
  json["max_tokens"] = spec.max_tokens();
  json["ttl_seconds"] =
      spec.has_ttl() ? Json(static_cast<double>(TimeUtil::DurationToMilliseconds(spec.ttl())) / 1e3)
                     : Json(nullptr);
  json["labels"] = std::map<std::string, std::string>(spec.labels().begin(), spec.labels().end());
  json["model_fingerprint"] = spec.model_fingerprint();
  return json;
}

Json context_json(const v1::Context& context) {
  Json json;
  json["context_id"] = context.context_id();
  json["committed_length"] = context.committed_length();
  json["layer_lengths"] = context.layer_lengths();
  json["generation"] = context.generation();
  json["kv_bytes"] = context.kv_bytes();
  json["summary_bytes"] = context.summary_bytes();
  json["create_time"] =
      context.has_create_time() ? Json(TimeUtil::ToString(context.create_time())) : Json(nullptr);
  json["expire_time"] =
      context.has_expire_time() ? Json(TimeUtil::ToString(context.expire_time())) : Json(nullptr);
  json["spec"] = spec_json(context.spec());
  return json;
}

void print_context(const Invocation& invocation, const v1::Context& context) {
  if (invocation.json()) {
    print_json(context_json(context));
    return;
  }
  const v1::ContextSpec& spec = context.spec();
  Table table({"FIELD", "VALUE"});
  table.add({"id", context.context_id()});
  table.add({"tokens", format_count(context.committed_length())});
  table.add({"generation", std::to_string(context.generation())});
  table.add({"layers", std::to_string(spec.num_layers())});
  table.add({"heads",
             std::to_string(spec.num_query_heads()) + " query, " +
                 std::to_string(spec.num_kv_heads()) + " key-value"});
  table.add({"head size",
             std::to_string(spec.key_head_dim()) + " key, " + std::to_string(value_dim(spec)) +
                 " value"});
  table.add({"cache type", dtype_name(spec.kv_dtype())});
  table.add({"methods", joined(method_names(spec))});
  table.add({"default method", default_method_name(spec)});
  table.add({"layout",
             layout_name(spec.layout().kind()) + ", stripes of " +
                 std::to_string(spec.layout().stripe_tokens()) + " tokens"});
  table.add({"keys and values", format_bytes(static_cast<double>(context.kv_bytes()))});
  table.add({"summaries", format_bytes(static_cast<double>(context.summary_bytes()))});
  table.add({"created", TimeUtil::ToString(context.create_time())});
  table.add(
      {"expires", context.has_expire_time() ? TimeUtil::ToString(context.expire_time()) : "never"});
  for (const auto& [name, value] : spec.labels()) {
    table.add({"label " + name, value});
  }
  table.print();
}

// Prints the context as the server has it now.
int show(const Invocation& invocation, const client::Context& context) {
  const auto info = context.info();
  if (!info.ok()) {
    return report(invocation, info.status());
  }
  print_context(invocation, *info);
  return 0;
}

void add_create(CLI::App& group, Invocation& invocation) {
  auto* command = group.add_subcommand("create", "Make a context");
  auto options = std::make_shared<SpecOptions>();
  auto id = std::make_shared<std::string>();
  command->add_option("ID", *id, "1 to 128 of A-Z a-z 0-9 . _ -; left out: the server chooses");
  add_shape_options(*command, *options, invocation, true);
  add_method_option(*command, *options, invocation);
  complete_method_names(
      invocation,
      command->add_option(
          "--default-method", options->default_method, "for calls that name none; else the first"));
  add_placement_options(*command, *options, invocation);
  command->callback([&invocation, options, id] {
    invocation.action = [&invocation, options, id] {
      const auto server = invocation.connect();
      const auto spec = make_spec(*server, *options);
      if (!spec.ok()) {
        return report(invocation, spec.status());
      }
      const auto context = server->create_context(*spec, *id);
      return context.ok() ? show(invocation, *context) : report(invocation, context.status());
    };
  });
}

void add_get(CLI::App& group, Invocation& invocation) {
  auto* command = group.add_subcommand("get", "Show a context");
  auto id = std::make_shared<std::string>();
  complete_context_ids(invocation, command->add_option("ID", *id, "the context")->required());
  command->callback([&invocation, id] {
    invocation.action = [&invocation, id] {
      const auto server = invocation.connect();
      return show(invocation, server->context(*id));
    };
  });
}

int list_contexts(const Invocation& invocation) {
  const auto contexts = invocation.connect()->contexts();
  if (!contexts.ok()) {
    return report(invocation, contexts.status());
  }
  if (invocation.json()) {
    Json list = Json::array();
    for (const v1::Context& context : *contexts) {
      list.push_back(context_json(context));
    }
    print_json(list);
    return 0;
  }
  Table table({"ID", "TOKENS", "LAYERS", "HEADS", "TYPE", "BYTES", "DEFAULT METHOD", "EXPIRES"});
  for (const v1::Context& context : *contexts) {
    const v1::ContextSpec& spec = context.spec();
    table.add({context.context_id(),
               format_count(context.committed_length()),
               std::to_string(spec.num_layers()),
               std::to_string(spec.num_query_heads()) + "/" + std::to_string(spec.num_kv_heads()) +
                   "x" + std::to_string(spec.key_head_dim()),
               dtype_name(spec.kv_dtype()),
               format_bytes(static_cast<double>(context.kv_bytes() + context.summary_bytes())),
               default_method_name(spec),
               context.has_expire_time() ? TimeUtil::ToString(context.expire_time()) : "never"});
  }
  table.print();
  return 0;
}

void add_list(CLI::App& group, Invocation& invocation) {
  group.add_subcommand("list", "List the server's contexts")->callback([&invocation] {
    invocation.action = [&invocation] { return list_contexts(invocation); };
  });
}

void add_delete(CLI::App& group, Invocation& invocation) {
  auto* command = group.add_subcommand("delete", "Delete contexts");
  auto ids = std::make_shared<std::vector<std::string>>();
  auto allow_missing = std::make_shared<bool>(false);
  complete_context_ids(invocation, command->add_option("ID", *ids, "the contexts")->required());
  command->add_flag("--allow-missing", *allow_missing, "succeed when there is no such context");
  command->callback([&invocation, ids, allow_missing] {
    invocation.action = [&invocation, ids, allow_missing] {
      const auto server = invocation.connect();
      int code = 0;
      for (const std::string& id : *ids) {
        if (const Status status = server->context(id).remove(*allow_missing); !status.ok()) {
          code = report(invocation, status);
        }
      }
      return code;
    };
  });
}

void add_fork(CLI::App& group, Invocation& invocation) {
  auto* command = group.add_subcommand("fork", "Make a context that shares another's first tokens");
  struct Options {
    std::string id;
    std::string new_id;
    uint64_t num_tokens = 0;
  };
  auto options = std::make_shared<Options>();
  complete_context_ids(invocation,
                       command->add_option("ID", options->id, "the context")->required());
  command->add_option("TOKENS", options->num_tokens, "how many tokens they share")
      ->check(whole_number())
      ->required();
  command->add_option("--new-id", options->new_id, "left out: the server chooses");
  command->callback([&invocation, options] {
    invocation.action = [&invocation, options] {
      const auto server = invocation.connect();
      const auto child = server->context(options->id).fork(options->num_tokens, options->new_id);
      return child.ok() ? show(invocation, *child) : report(invocation, child.status());
    };
  });
}

void add_truncate(CLI::App& group, Invocation& invocation) {
  auto* command = group.add_subcommand("truncate", "Keep a context's first tokens");
  auto id = std::make_shared<std::string>();
  auto num_tokens = std::make_shared<uint64_t>(0);
  complete_context_ids(invocation, command->add_option("ID", *id, "the context")->required());
  command->add_option("TOKENS", *num_tokens, "how many tokens stay")
      ->check(whole_number())
      ->required();
  command->callback([&invocation, id, num_tokens] {
    invocation.action = [&invocation, id, num_tokens] {
      const auto server = invocation.connect();
      const auto context = server->context(*id).truncate(*num_tokens);
      if (!context.ok()) {
        return report(invocation, context.status());
      }
      print_context(invocation, *context);
      return 0;
    };
  });
}

}  // namespace

void add_context_command(CLI::App& app, Invocation& invocation) {
  auto* group = app.add_subcommand("context", "Make, show, fork, truncate and delete contexts");
  group->require_subcommand(1);
  add_create(*group, invocation);
  add_get(*group, invocation);
  add_list(*group, invocation);
  add_delete(*group, invocation);
  add_fork(*group, invocation);
  add_truncate(*group, invocation);
}

}  // namespace longspan::cli
