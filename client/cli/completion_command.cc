// `longspan completion`: small scripts for three shells that ask `longspan __complete` what fits.
#include <algorithm>
#include <cstdio>
#include <memory>

#include "client/cli/commands.h"
#include "client/cli/text.h"

namespace longspan::cli {
namespace {

constexpr const char* kBash = R"(# bash completion of longspan: source <(longspan completion bash)
_longspan() {
  local IFS=$'\n'
  COMPREPLY=($(longspan __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o bashdefault -o default -F _longspan longspan
)";

constexpr const char* kZsh = R"(#compdef longspan
# zsh completion of longspan: source <(longspan completion zsh)
_longspan() {
  local -a candidates
  candidates=("${(@f)$(longspan __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
  if [[ -n ${candidates[1]} ]]; then
    compadd -- "${candidates[@]}"
  else
    _files
  fi
}
compdef _longspan longspan
)";

constexpr const char* kFish = R"(# fish completion of longspan: longspan completion fish | source
function __longspan_complete
  set -l words (commandline -opc)
  set -l candidates (longspan __complete $words[2..-1] (commandline -ct) 2>/dev/null)
  if test -n "$candidates"
    printf '%s\n' $candidates
  else
    __fish_complete_path (commandline -ct)
  end
end
complete -c longspan -f -a '(__longspan_complete)'
)";

CLI::App* find_subcommand(CLI::App& app, const std::string& word) {
  for (CLI::App* subcommand : app.get_subcommands([](CLI::App*) { return true; })) {
    if (subcommand->get_name() == word) {
      return subcommand;
    }
  }
  return nullptr;
}

// Options of a command, or else of those around it.
CLI::Option* find_option(CLI::App* app, const std::string& word) {
  for (; app != nullptr; app = app->get_parent()) {
    if (CLI::Option* option = app->get_option_no_throw(word)) {
      return option;
    }
  }
  return nullptr;
}

bool takes_value(const CLI::Option* option) {
  return option != nullptr && option->get_expected_max() > 0 &&
         option->get_items_expected_max() > 0;
}

// Where the words before the last one lead.
struct Place {
  CLI::App* app = nullptr;
  CLI::Option* value_of = nullptr;  // the option whose value comes next
  size_t num_positionals = 0;
};

Place walk(CLI::App& app, const std::vector<std::string>& words) {
  Place place{&app};
  for (size_t index = 0; index + 1 < words.size(); ++index) {
    const std::string& word = words[index];
    if (place.value_of != nullptr) {
      place.value_of = nullptr;
    } else if (!word.empty() && word[0] == '-') {
      CLI::Option* option = find_option(place.app, word);
      place.value_of = takes_value(option) ? option : nullptr;
    } else if (CLI::App* subcommand = find_subcommand(*place.app, word)) {
      place = Place{subcommand};
    } else {
      ++place.num_positionals;
    }
  }
  return place;
}

std::vector<std::string> option_names(CLI::App* app) {
  std::vector<std::string> names;
  for (; app != nullptr; app = app->get_parent()) {
    for (const CLI::Option* option : app->get_options()) {
      for (const std::string& name : option->get_lnames()) {
        names.push_back("--" + name);
      }
    }
  }
  return names;
}

// The positional that the next bare word fills; the last one may take several.
const CLI::Option* next_positional(CLI::App& app, size_t num_given) {
  const CLI::Option* last = nullptr;
  for (const CLI::Option* option : app.get_options()) {
    if (option->get_positional()) {
      last = option;
      if (num_given-- == 0) {
        return option;
      }
    }
  }
  return last != nullptr && last->get_expected_max() > 1 ? last : nullptr;
}

std::vector<std::string> candidates(CLI::App& app,
                                    const Invocation& invocation,
                                    const std::vector<std::string>& words) {
  const Place place = walk(app, words);
  const CLI::Option* option = place.value_of;
  if (option == nullptr && !words.empty() && !words.back().empty() && words.back()[0] == '-') {
    return option_names(place.app);
  }
  std::vector<std::string> values;
  if (option == nullptr) {
    for (const CLI::App* subcommand : place.app->get_subcommands([](CLI::App*) { return true; })) {
      values.push_back(subcommand->get_name());
    }
    option = next_positional(*place.app, place.num_positionals);
  }
  if (const auto choices = invocation.choices.find(option); choices != invocation.choices.end()) {
    for (std::string& value : choices->second()) {
      values.push_back(std::move(value));
    }
  }
  return values;
}

}  // namespace

std::vector<std::string> complete(CLI::App& app,
                                  const Invocation& invocation,
                                  const std::vector<std::string>& words) {
  std::vector<std::string> fitting;
  const std::string prefix = words.empty() ? "" : words.back();
  for (std::string& candidate : candidates(app, invocation, words)) {
    if (candidate.compare(0, prefix.size(), prefix) == 0) {
      fitting.push_back(std::move(candidate));
    }
  }
  std::sort(fitting.begin(), fitting.end());
  fitting.erase(std::unique(fitting.begin(), fitting.end()), fitting.end());
  return fitting;
}

void add_completion_command(CLI::App& app, Invocation& invocation) {
  auto* command = app.add_subcommand("completion", "Print a completion script for a shell");
  auto shell = std::make_shared<std::string>();
  limit_to(invocation,
           command->add_option("SHELL", *shell, "bash, zsh or fish")->required(),
           {"bash", "zsh", "fish"});
  command->footer(
      "bash: source <(longspan completion bash)\n"
      "zsh:  source <(longspan completion zsh)\n"
      "fish: longspan completion fish | source");
  command->callback([&invocation, shell] {
    invocation.action = [shell] {
      std::fputs(*shell == "bash" ? kBash : *shell == "zsh" ? kZsh : kFish, stdout);
      return 0;
    };
  });
}

void add_version_command(CLI::App& app, Invocation& invocation) {
  app.add_subcommand("version", "Print the version")->callback([&invocation] {
    invocation.action = [&invocation] {
      if (invocation.json()) {
        print_json({{"version", LONGSPAN_VERSION}});
      } else {
        std::printf("longspan %s\n", LONGSPAN_VERSION);
      }
      return 0;
    };
  });
}

}  // namespace longspan::cli
