#include "client/cli/npy.h"

#include <cstring>
#include <fstream>
#include <iterator>
#include <regex>
#include <vector>

#include "absl/strings/str_cat.h"

#include "base/checked.h"

namespace longspan::cli {
namespace {

constexpr char kMagic[] = "\x93NUMPY";
constexpr size_t kMagicBytes = 6;

// The header's text and where the data begins; empty when the file is not of this format.
struct Header {
  std::string text;
  size_t data_offset = 0;
};

// Magic, two bytes of version, then the length of the header: 2 bytes before version 2, 4 after.
Header read_header(const std::string& file) {
  if (file.size() < 10 || std::memcmp(file.data(), kMagic, kMagicBytes) != 0) {
    return {};
  }
  const auto byte = [&](size_t offset) {
    return static_cast<size_t>(static_cast<unsigned char>(file[offset]));
  };
  size_t offset = 10;
  size_t length = byte(8) | byte(9) << 8;
  if (byte(6) >= 2) {
    if (file.size() < 12) {
      return {};
    }
    offset = 12;
    length |= byte(10) << 16 | byte(11) << 24;
  }
  if (length > file.size() - offset) {
    return {};
  }
  return {file.substr(offset, length), offset + length};
}

std::optional<DataType> parse_type(const std::string& name) {
  if (name == "<f4") {
    return DataType::kFloat32;
  }
  if (name == "<f2") {
    return DataType::kFloat16;
  }
  if (name == "<V2" || name == "|V2") {
    return DataType::kBFloat16;
  }
  return std::nullopt;
}

// Digits of up to 18 places fit in 64 bits.
std::vector<int64_t> parse_shape(const std::string& text) {
  static const std::regex kNumber("[0-9]{1,18}");
  std::vector<int64_t> shape;
  for (std::sregex_iterator match(text.begin(), text.end(), kNumber), end; match != end; ++match) {
    shape.push_back(std::stoll(match->str()));
  }
  return shape;
}

}  // namespace

Status read_npy(const std::string& path, Array& array) {
  const auto refuse = [&](const std::string& why) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", why));
  };
  std::ifstream stream(path, std::ios::binary);
  if (!stream) {
    return refuse("cannot be read");
  }
  const std::string file((std::istreambuf_iterator<char>(stream)), {});
  const Header header = read_header(file);
  static const std::regex kTypeField("'descr': *'([^']*)'");
  static const std::regex kOrderField("'fortran_order': *False");
  static const std::regex kShapeField("'shape': *\\(([0-9, ]*)\\)");
  std::smatch type;
  std::smatch shape_text;
  if (!std::regex_search(header.text, type, kTypeField) ||
      !std::regex_search(header.text, shape_text, kShapeField)) {
    return refuse("not a numpy .npy file");
  }
  const auto dtype = parse_type(type[1]);
  if (!dtype) {
    return refuse(absl::StrCat("type ", type[1].str(), "; must be float32, float16 or bfloat16"));
  }
  if (!std::regex_search(header.text, kOrderField)) {
    return refuse("in Fortran order; save numpy.ascontiguousarray of it");
  }
  std::vector<int64_t> shape = parse_shape(shape_text[1]);
  if (shape.size() == 2) {
    shape.insert(shape.begin(), 1);
  }
  if (shape.size() != 3) {
    return refuse(absl::StrCat("has ", shape.size(), " dimensions; must be [tokens, heads, dim]"));
  }
  const auto bytes = checked_product(shape[0], shape[1], shape[2], size_of(*dtype));
  if (!bytes || *bytes != static_cast<int64_t>(file.size() - header.data_offset)) {
    return refuse("its size does not fit its shape");
  }
  array.bytes = file.substr(header.data_offset);
  array.rows = {*dtype, array.bytes.data(), shape[0], shape[1], shape[2]};
  return absl::OkStatus();
}

}  // namespace longspan::cli
