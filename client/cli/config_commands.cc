// `longspan serve` and `longspan config`: the server's options from file, environment and flags.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "client/cli/commands.h"
#include "client/cli/serve.h"
#include "client/cli/text.h"

namespace longspan::cli {
namespace {

using Json = nlohmann::ordered_json;

// The server's configuration with everything that may set it.
struct Configuration {
  ServeConfig config;
  Options options = serve_options(config);
  ConfigSources sources;
};

void add_options(CLI::App& command, Invocation& invocation, Configuration& configuration) {
  for (const Option& option : configuration.options) {
    const auto set = [&configuration, name = option.name](const std::string& value) {
      configuration.sources.flags.emplace_back(name, value);
    };
    CLI::Option* flag = command
                            .add_option_function<std::string>(
                                option.flag(), set, option.help + " (" + option.environment() + ")")
                            ->type_name(option.type())
                            ->default_str(option.value())
                            ->take_last()
                            ->group("Options of the server");
    if (!option.choices.empty()) {
      // Not checked here: load_config reports every error at once.
      invocation.choices[flag] = [values = option.choices] { return values; };
    } else if (option.type() == "boolean") {
      invocation.choices[flag] = [] { return std::vector<std::string>{"true", "false"}; };
    }
  }
}

// Reads all sources; prints every error and answers false when there is one.
bool load(const Invocation& invocation, Configuration& configuration) {
  configuration.sources.environment = environment_of_process(configuration.options);
  const auto errors = load_config(configuration.options, configuration.sources);
  if (invocation.json() && !errors.empty()) {
    Json list = Json::array();
    for (const ConfigError& error : errors) {
      list.push_back({{"where", error.where}, {"message", error.message}});
    }
    print_json({{"valid", false}, {"errors", list}});
    return false;
  }
  for (const ConfigError& error : errors) {
    std::fprintf(stderr, "longspan: %s: %s\n", error.where.c_str(), error.message.c_str());
  }
  return errors.empty();
}

constexpr int kUsage = 2;

}  // namespace

void add_serve_command(CLI::App& app, Invocation& invocation) {
  auto* command = app.add_subcommand("serve", "Run a server: coordinator and ranks in one process");
  auto configuration = std::make_shared<Configuration>();
  command->add_option("--config", configuration->sources.file, "file of the server's options")
      ->envname("LONGSPAN_CONFIG");
  add_options(*command, invocation, *configuration);
  command->footer(
      "Flags win over the environment, which wins over the file. `longspan config print` shows the "
      "result.");
  command->callback([&invocation, configuration] {
    invocation.action = [&invocation, configuration] {
      return load(invocation, *configuration) ? serve(configuration->config) : kUsage;
    };
  });
}

void add_config_command(CLI::App& app, Invocation& invocation) {
  auto* group = app.add_subcommand("config", "Check and print the server's configuration");
  group->require_subcommand(1);

  auto* check = group->add_subcommand("check", "Report every error in a file and the environment");
  auto checked = std::make_shared<Configuration>();
  check->add_option("FILE", checked->sources.file, "the file")->envname("LONGSPAN_CONFIG");
  add_options(*check, invocation, *checked);
  check->callback([&invocation, checked] {
    invocation.action = [&invocation, checked] {
      if (!load(invocation, *checked)) {
        return kUsage;
      }
      if (invocation.json()) {
        print_json({{"valid", true}, {"errors", Json::array()}});
      } else {
        std::printf("the configuration is valid\n");
      }
      return 0;
    };
  });

  auto* print = group->add_subcommand("print", "Print what `serve` with the same flags would use");
  auto printed = std::make_shared<Configuration>();
  print->add_option("--config", printed->sources.file, "the file")->envname("LONGSPAN_CONFIG");
  add_options(*print, invocation, *printed);
  print->callback([&invocation, printed] {
    invocation.action = [&invocation, printed] {
      if (!load(invocation, *printed)) {
        return kUsage;
      }
      if (invocation.json()) {
        Json values;
        for (const Option& option : printed->options) {
          values[option.name] = option.value();
        }
        print_json(values);
      } else {
        std::fputs(print_config(printed->options).c_str(), stdout);
      }
      return 0;
    };
  });
}

}  // namespace longspan::cli
