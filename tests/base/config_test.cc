// Configuration: precedence, every error at once with its place, and print -> load round trips.
#include "base/config.h"

#include <fstream>
#include <string>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace longspan {
namespace {

using std::chrono::milliseconds;
using testing::ElementsAre;
using testing::HasSubstr;

struct Settings {
  bool verbose = false;
  int64_t port = 7;
  int64_t memory = 1 << 20;
  std::string name = "plain";
  milliseconds patience{500};

  Options options() {
    return {{"verbose", &verbose, "Say more"},
            {"port", &port, "A port", 0, 65535},
            {"memory", &memory, "Memory", 1024, int64_t{1} << 40, Option::Unit::kBytes},
            {.name = "name", .target = &name, .help = "A name", .choices = {"plain", "fancy one"}},
            {"patience", &patience, "How long", 1, 3'600'000}};
  }
};

class ConfigTest : public testing::Test {
 protected:
  std::string write_file(const std::string& text) const {
    std::string path = testing::TempDir() + "/config_test.conf";
    std::ofstream(path) << text;
    return path;
  }

  Settings settings_;
  Options options_ = settings_.options();
};

std::vector<std::string> places(const std::vector<ConfigError>& errors) {
  std::vector<std::string> found;
  found.reserve(errors.size());
  for (const ConfigError& error : errors) {
    found.push_back(error.where);
  }
  return found;
}

TEST_F(ConfigTest, FlagsBeatEnvironmentBeatsFileBeatsDefaults) {
  const std::string file = write_file("port = 1\nmemory = 64MiB\nname = \"fancy one\"\n");
  const auto errors =
      load_config(options_,
                  {.file = file,
                   .environment = {{"LONGSPAN_PORT", "2"}, {"LONGSPAN_MEMORY", "2GiB"}},
                   .flags = {{"port", "3"}}});
  EXPECT_TRUE(errors.empty());
  EXPECT_EQ(settings_.port, 3);
  EXPECT_EQ(settings_.memory, int64_t{2} << 30);
  EXPECT_EQ(settings_.name, "fancy one");
  EXPECT_EQ(settings_.patience, milliseconds(500));
}

TEST_F(ConfigTest, EveryErrorIsReportedWithItsPlace) {
  const std::string file = write_file(
      "# a comment\n"
      "port = 70000\n"
      "\n"
      "nosuch = 1\n"
      "verbose\n"
      "memory = 12 parsecs   # trailing comment\n"
      "name = \"open\n"
      "patience = 2s\n"
      "patience = 3s\n");
  const auto errors = load_config(options_,
                                  {.file = file,
                                   .environment = {{"LONGSPAN_VERBOSE", "perhaps"}},
                                   .flags = {{"name", "other"}, {"unheard_of", "1"}}});
  EXPECT_THAT(places(errors),
              ElementsAre(file + ":2",
                          file + ":4",
                          file + ":5",
                          file + ":6",
                          file + ":7",
                          file + ":9",
                          "LONGSPAN_VERBOSE",
                          "--name",
                          "unheard_of"));
  EXPECT_THAT(errors[0].message, HasSubstr("0 to 65535"));
  EXPECT_THAT(errors[7].message, HasSubstr("plain, fancy one"));
  EXPECT_EQ(settings_.port, 7) << "a bad value changes nothing";
  EXPECT_EQ(settings_.patience, milliseconds(2000));
}

TEST_F(ConfigTest, AFileThatIsNotThere) {
  EXPECT_THAT(places(load_config(options_, {.file = "/nonexistent/x.conf"})),
              ElementsAre("/nonexistent/x.conf"));
}

TEST_F(ConfigTest, WhatIsPrintedIsReadBack) {
  settings_ = {.verbose = true,
               .port = 4242,
               .memory = int64_t{3} << 30,
               .name = "fancy one",
               .patience = milliseconds(1250)};
  const std::string file = write_file(print_config(options_));
  settings_ = Settings();
  EXPECT_TRUE(load_config(options_, {.file = file}).empty());
  EXPECT_TRUE(settings_.verbose);
  EXPECT_EQ(settings_.port, 4242);
  EXPECT_EQ(settings_.memory, int64_t{3} << 30);
  EXPECT_EQ(settings_.name, "fancy one");
  EXPECT_EQ(settings_.patience, milliseconds(1250));
}

TEST_F(ConfigTest, NumbersAreCheckedForOverflow) {
  for (const char* text :
       {"99999999999999999999", "9007199254740993TiB", "-1", "", "1e3", "0x10"}) {
    EXPECT_FALSE(options_[2].set(text).ok()) << text;
  }
  EXPECT_EQ(settings_.memory, 1 << 20);
  EXPECT_FALSE(options_[4].set("9999999999999h").ok());
}

TEST_F(ConfigTest, NamesOfOptions) {
  const Option option{.name = "max_queue_depth", .target = &settings_.port, .help = ""};
  EXPECT_EQ(option.flag(), "--max-queue-depth");
  EXPECT_EQ(option.environment(), "LONGSPAN_MAX_QUEUE_DEPTH");
}

}  // namespace
}  // namespace longspan
