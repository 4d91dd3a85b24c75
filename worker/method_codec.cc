#include "worker/method_codec.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <limits>
#include <set>
#include <sstream>
#include <utility>

#include "google/protobuf/io/tokenizer.h"
#include "google/protobuf/text_format.h"

#include "kernels/anchors.h"

namespace longspan {
namespace {

// A value of a wire enumeration that is served, and what it stands for.
template <class Target>
struct Served {
  int wire;
  Target target;
};

constexpr Served<SummaryKind> kSummaryKinds[] = {
    {v1::Summary::KIND_UNSPECIFIED, SummaryKind::kNone},
    {v1::Summary::KIND_NONE, SummaryKind::kNone},
    {v1::Summary::KIND_MEAN, SummaryKind::kMean},
    {v1::Summary::KIND_MIN_MAX, SummaryKind::kMinMax},
    {v1::Summary::KIND_COMPRESSED, SummaryKind::kCompressed}};
constexpr Served<QuerySource> kQuerySources[] = {
    {v1::Search::QUERY_UNSPECIFIED, QuerySource::kAttention},
    {v1::Search::QUERY_ATTENTION, QuerySource::kAttention},
    {v1::Search::QUERY_SUPPLIED, QuerySource::kSupplied}};
constexpr Served<QueryReduce> kQueryReduces[] = {
    {v1::Search::QUERY_REDUCE_UNSPECIFIED, QueryReduce::kNone},
    {v1::Search::QUERY_REDUCE_NONE, QueryReduce::kNone},
    {v1::Search::QUERY_REDUCE_GROUP_MEAN, QueryReduce::kGroupMean},
    {v1::Search::QUERY_REDUCE_ALL_MEAN, QueryReduce::kAllMean}};
constexpr Served<SearchView> kViews[] = {{v1::Search::VIEW_UNSPECIFIED, SearchView::kSummary},
                                         {v1::Search::VIEW_SUMMARY, SearchView::kSummary},
                                         {v1::Search::VIEW_ANCHOR, SearchView::kAnchor}};
constexpr Served<ScoreKind> kScores[] = {{v1::Search::SCORE_UNSPECIFIED, ScoreKind::kDot},
                                         {v1::Search::SCORE_DOT, ScoreKind::kDot},
                                         {v1::Search::SCORE_BOUND, ScoreKind::kBound}};
constexpr Served<Normalise> kNormalises[] = {{v1::Search::NORMALISE_UNSPECIFIED, Normalise::kRaw},
                                             {v1::Search::NORMALISE_RAW, Normalise::kRaw},
                                             {v1::Search::NORMALISE_SOFTMAX, Normalise::kSoftmax}};
constexpr Served<HeadReduce> kHeadReduces[] = {
    {v1::Search::HEAD_REDUCE_UNSPECIFIED, HeadReduce::kNone},
    {v1::Search::HEAD_REDUCE_NONE, HeadReduce::kNone},
    {v1::Search::HEAD_REDUCE_GROUP_SUM, HeadReduce::kGroupSum},
    {v1::Search::HEAD_REDUCE_GROUP_MEAN, HeadReduce::kGroupMean},
    {v1::Search::HEAD_REDUCE_GROUP_MAX, HeadReduce::kGroupMax},
    {v1::Search::HEAD_REDUCE_ALL_SUM, HeadReduce::kAllSum},
    {v1::Search::HEAD_REDUCE_ALL_MEAN, HeadReduce::kAllMean},
    {v1::Search::HEAD_REDUCE_ALL_MAX, HeadReduce::kAllMax}};
// Whether the overlapping windows of a block are summed.
constexpr Served<bool> kBlockReduces[] = {{v1::Search::BLOCK_REDUCE_UNSPECIFIED, false},
                                          {v1::Search::BLOCK_REDUCE_NONE, false},
                                          {v1::Search::BLOCK_REDUCE_OVERLAP_SUM, true}};
constexpr Served<SelectionKind> kSelectionKinds[] = {
    {v1::Selection::KIND_UNSPECIFIED, SelectionKind::kNone},
    {v1::Selection::KIND_NONE, SelectionKind::kNone},
    {v1::Selection::KIND_ALL, SelectionKind::kAll},
    {v1::Selection::KIND_TOP_K, SelectionKind::kTopK}};
constexpr Served<BranchSource> kSources[] = {
    {v1::Branch::SOURCE_UNSPECIFIED, BranchSource::kTokens},
    {v1::Branch::SOURCE_TOKENS, BranchSource::kTokens},
    {v1::Branch::SOURCE_SUMMARIES, BranchSource::kSummaries}};
constexpr Served<MergeKind> kMergeKinds[] = {{v1::Merge::KIND_UNSPECIFIED, MergeKind::kLse},
                                             {v1::Merge::KIND_LSE, MergeKind::kLse},
                                             {v1::Merge::KIND_GATES, MergeKind::kGates},
                                             {v1::Merge::KIND_SPAN_SCORES, MergeKind::kSpanScores}};

// Decodes the parts of one message, under the path of that message.
class Decoder {
 public:
  Decoder(std::string path, Findings& findings) : path_(std::move(path)), findings_(findings) {}

  std::string field(absl::string_view name) const { return field_path(path_, name); }
  Decoder at(absl::string_view name) const { return {field(name), findings_}; }
  void invalid(absl::string_view name, absl::string_view why) const {
    findings_.add_invalid(field(name), why);
  }
  void unserved(absl::string_view name, absl::string_view why) const {
    findings_.add_unserved(field(name), why);
  }
  void refuse_if(bool present, absl::string_view name) const {
    if (present) {
      unserved(name, "is not served");
    }
  }

  // A value that the enumeration has but the table has not is not served; another is invalid.
  template <class Wire, class Target, size_t N>
  Target choose(Wire value, const Served<Target> (&table)[N], absl::string_view name) const {
    for (const Served<Target>& entry : table) {
      if (entry.wire == static_cast<int>(value)) {
        return entry.target;
      }
    }
    const std::string& known = google::protobuf::internal::NameOfEnum(
        google::protobuf::GetEnumDescriptor<Wire>(), static_cast<int>(value));
    if (known.empty()) {
      invalid(name, absl::StrCat("has the unknown value ", static_cast<int>(value)));
    } else {
      unserved(name, absl::StrCat(known, " is not served"));
    }
    return table[0].target;
  }

  int size(uint32_t value, absl::string_view name) const {
    if (value > static_cast<uint32_t>(std::numeric_limits<int>::max())) {
      invalid(name, "is too large");
      return 0;
    }
    return static_cast<int>(value);
  }

  Rational rational(double value, absl::string_view name) const {
    const StatusOr<Rational> exact = rational_from_double(value);
    if (!exact.ok()) {
      invalid(name, exact.status().message());
      return {};
    }
    return *exact;
  }

 private:
  std::string path_;
  Findings& findings_;
};

SummarySpec decode_summary(const v1::Summary& message, const Decoder& decoder) {
  SummarySpec summary;
  summary.kind = decoder.choose(message.kind(), kSummaryKinds, "kind");
  summary.block_tokens = decoder.size(message.block_tokens(), "block_tokens");
  summary.window_tokens = decoder.size(message.window_tokens(), "window_tokens");
  summary.stride_tokens = decoder.size(message.stride_tokens(), "stride_tokens");
  summary.key_weights.assign(message.key_weights().begin(), message.key_weights().end());
  summary.value_weights.assign(message.value_weights().begin(), message.value_weights().end());
  summary.scale_by_sqrt_length = message.scale_by_sqrt_length();

  const bool has_weights = message.key_weights_size() > 0 || message.value_weights_size() > 0;
  if (!v1::Summary::Pooling_IsValid(message.pooling())) {
    decoder.invalid("pooling", "has an unknown value");
  } else if (message.pooling() == v1::Summary::POOLING_WEIGHTED) {
    if (message.key_weights_size() == 0) {
      decoder.invalid("key_weights", "are needed by WEIGHTED pooling");
    }
  } else if (has_weights) {
    decoder.invalid("pooling", "must be WEIGHTED where weights are given");
  }
  if (message.levels() > 1) {
    decoder.unserved("levels", "more than one level is not served");
  }
  decoder.refuse_if(message.bits() != 0, "bits");
  return summary;
}

SearchSpec decode_search(const v1::Branch& branch, const Decoder& decoder) {
  const v1::Search& message = branch.search();
  SearchSpec search;
  search.query = decoder.choose(message.query(), kQuerySources, "query");
  search.query_reduce = decoder.choose(message.query_reduce(), kQueryReduces, "query_reduce");
  search.view = decoder.choose(message.view(), kViews, "view");
  search.score = decoder.choose(message.score(), kScores, "score");
  search.normalise = decoder.choose(message.normalise(), kNormalises, "normalise");
  search.head_reduce = decoder.choose(message.head_reduce(), kHeadReduces, "head_reduce");
  if (message.has_anchors()) {
    search.anchor_power = decoder.at("anchors").rational(message.anchors().power(), "power");
    search.anchor_first_stripe = message.anchors().first_stripe();
    if (search.view != SearchView::kAnchor) {
      decoder.invalid("anchors", "need view ANCHOR");
    }
  }

  const bool overlap_sum = decoder.choose(message.block_reduce(), kBlockReduces, "block_reduce");
  if (overlap_sum && search.normalise != Normalise::kSoftmax) {
    decoder.unserved("block_reduce", "OVERLAP_SUM is served for SOFTMAX scores only");
  }
  const v1::Summary& summary = branch.summary();
  const bool one_window_a_block = summary.window_tokens() == summary.stride_tokens() &&
                                  summary.window_tokens() == branch.selection().block_tokens();
  if (search.normalise == Normalise::kSoftmax && !overlap_sum && !one_window_a_block) {
    decoder.unserved("block_reduce", "SOFTMAX scores of several windows need OVERLAP_SUM");
  }
  return search;
}

SelectionSpec decode_selection(const v1::Selection& message, const Decoder& decoder) {
  SelectionSpec selection;
  selection.kind = decoder.choose(message.kind(), kSelectionKinds, "kind");
  selection.block_tokens = decoder.size(message.block_tokens(), "block_tokens");
  selection.forced_first_blocks =
      decoder.size(message.forced_first_blocks(), "forced_first_blocks");
  selection.forced_last_blocks =
      std::max(1, decoder.size(message.forced_last_blocks(), "forced_last_blocks"));
  selection.forced_within_budget = message.forced_within_budget();
  if (message.has_spans()) {
    const Decoder spans = decoder.at("spans");
    selection.spans = true;
    selection.span_power = spans.rational(message.spans().power(), "power");
    selection.span_backward = spans.rational(message.spans().backward(), "backward");
    selection.span_forward = spans.rational(message.spans().forward(), "forward");
  }
  decoder.refuse_if(message.threshold() != 0, "threshold");
  decoder.refuse_if(message.tree_stages_size() > 0, "tree_stages");
  decoder.refuse_if(message.reuse_layers() != 0, "reuse_layers");
  decoder.refuse_if(message.reuse_steps() != 0, "reuse_steps");
  decoder.refuse_if(message.per_segment(), "per_segment");
  return selection;
}

StaticMask decode_mask(const v1::StaticMask& message, const Decoder& decoder) {
  if (!v1::StaticMask::Causality_IsValid(message.causality())) {
    decoder.invalid("causality", "has an unknown value");
  }
  decoder.refuse_if(message.causality() == v1::StaticMask::CAUSALITY_BIDIRECTIONAL, "causality");
  decoder.refuse_if(message.has_strided_columns(), "strided_columns");
  decoder.refuse_if(message.has_power_of_two(), "power_of_two");
  decoder.refuse_if(message.has_neighbourhood(), "neighbourhood");
  decoder.refuse_if(message.has_radial(), "radial");
  decoder.refuse_if(message.has_scale_band(), "scale_band");
  decoder.refuse_if(message.segment_pairs_size() > 0, "segment_pairs");
  return {message.window_tokens(), message.sink_tokens()};
}

Amount decode_amount(const v1::Budget::Amount& message, const Decoder& decoder) {
  Amount amount;
  amount.min_blocks = message.min_blocks();
  amount.max_blocks = message.max_blocks();
  switch (message.amount_case()) {
    case v1::Budget::Amount::kBlocks:
      amount.kind = Amount::Kind::kBlocks;
      amount.value = message.blocks();
      break;
    case v1::Budget::Amount::kTokens:
      amount.kind = Amount::Kind::kTokens;
      amount.value = message.tokens();
      break;
    case v1::Budget::Amount::kRatio:
      amount.kind = Amount::Kind::kRatio;
      amount.value = message.ratio();
      break;
    case v1::Budget::Amount::kMass:
      decoder.unserved("mass", "is not served");
      break;
    case v1::Budget::Amount::kAffine:
      decoder.unserved("affine", "is not served");
      break;
    case v1::Budget::Amount::AMOUNT_NOT_SET:
      break;
  }
  return amount;
}

Budget decode_budget(const v1::Budget& message, const Decoder& decoder) {
  Budget budget;
  if (message.has_both()) {
    budget.prefill = decode_amount(message.both(), decoder.at("both"));
    budget.decode = budget.prefill;
  }
  if (message.has_prefill()) {
    budget.prefill = decode_amount(message.prefill(), decoder.at("prefill"));
  }
  if (message.has_decode()) {
    budget.decode = decode_amount(message.decode(), decoder.at("decode"));
  }
  return budget;
}

Branch decode_branch(const v1::Branch& message, const Decoder& decoder) {
  Branch branch;
  branch.name = message.name();
  branch.source = decoder.choose(message.source(), kSources, "source");
  branch.summary = decode_summary(message.summary(), decoder.at("summary"));
  branch.search = decode_search(message, decoder.at("search"));
  branch.selection = decode_selection(message.selection(), decoder.at("selection"));
  branch.mask = decode_mask(message.mask(), decoder.at("mask"));
  branch.budget = decode_budget(message.budget(), decoder.at("budget"));
  return branch;
}

void decode_roles(const v1::Roles& message, const Decoder& decoder, Method& method) {
  for (const uint32_t layer : message.dense_layers()) {
    method.dense_layers.push_back(decoder.size(layer, "dense_layers"));
  }
  if (!v1::Roles::Phase_IsValid(message.dense_phase())) {
    decoder.invalid("dense_phase", "has an unknown value");
  }
  method.dense_prefill = message.dense_phase() == v1::Roles::PHASE_PREFILL;
  method.dense_decode = message.dense_phase() == v1::Roles::PHASE_DECODE;
  if (message.dense_below_tokens() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
    decoder.invalid("dense_below_tokens", "is too large");
  } else {
    method.dense_below_tokens = static_cast<int64_t>(message.dense_below_tokens());
  }
  decoder.refuse_if(message.heads_size() > 0, "heads");
}

constexpr size_t kMaxNameLength = 64;
constexpr int kMaxListLength = 1 << 16;

// Keeps the first syntax error of a text-format file.
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

StatusOr<v1::Method> load_method(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  if (!file) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": cannot be read"));
  }
  v1::Method message;
  FirstError error;
  google::protobuf::TextFormat::Parser parser;
  parser.RecordErrorsTo(&error);
  if (!parser.ParseFromString(text.str(), &message)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ":", error.text()));
  }
  Findings findings;
  decode_method(message, "", findings);
  if (!findings.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", findings.status().message()));
  }
  return message;
}

}  // namespace

Method decode_method(const v1::Method& message, absl::string_view path, Findings& findings) {
  const Decoder decoder{std::string(path), findings};
  const size_t found_before = findings.invalid.size() + findings.unserved.size();
  Method method;
  method.name = message.name();
  if (message.name().empty() || message.name().size() > kMaxNameLength) {
    decoder.invalid("name", absl::StrCat("must have 1 to ", kMaxNameLength, " characters"));
  }
  if (message.branches_size() > kMaxListLength ||
      message.roles().dense_layers_size() > kMaxListLength) {
    decoder.invalid("", "has too many branches or layers");
    return method;
  }
  for (int i = 0; i < message.branches_size(); ++i) {
    method.branches.push_back(
        decode_branch(message.branches(i), decoder.at(absl::StrCat("branches[", i, "]"))));
  }
  method.merge = decoder.at("merge").choose(message.merge().kind(), kMergeKinds, "kind");
  decode_roles(message.roles(), decoder.at("roles"), method);
  // The rules of the kernels hold for methods that could be decoded: what is not served has no
  // place in the struct.
  if (findings.invalid.size() + findings.unserved.size() == found_before) {
    for (const FieldViolation& violation : validate(method)) {
      decoder.invalid(violation.field, violation.description);
    }
  }
  return method;
}

v1::Method encode_dense_method() {
  const Method dense = dense_method();
  v1::Method message;
  message.set_name(dense.name);
  v1::Branch& branch = *message.add_branches();
  branch.set_name(dense.branches.front().name);
  branch.mutable_selection()->set_kind(v1::Selection::KIND_ALL);
  return message;
}

StatusOr<std::vector<v1::Method>> load_methods(const std::string& directory) {
  std::error_code error;
  std::vector<std::string> paths;
  for (std::filesystem::directory_iterator entry(directory, error), end; !error && entry != end;
       entry.increment(error)) {
    if (entry->path().extension() == ".txtpb") {
      paths.push_back(entry->path().string());
    }
  }
  if (error) {
    return absl::InvalidArgumentError(absl::StrCat(directory, ": ", error.message()));
  }
  std::sort(paths.begin(), paths.end());
  std::vector<v1::Method> methods;
  std::set<std::string> names;
  for (const std::string& path : paths) {
    LONGSPAN_ASSIGN_OR_RETURN(v1::Method message, load_method(path));
    if (!names.insert(message.name()).second) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": another file has the name \"", message.name(), "\" already"));
    }
    methods.push_back(std::move(message));
  }
  return methods;
}

}  // namespace longspan
