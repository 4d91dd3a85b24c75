#include "worker/streams.h"

#include <algorithm>

#include "base/checked.h"
#include "worker/page_pool.h"

namespace longspan {
namespace {

std::vector<SummarySpec> distinct_summaries(const ContextShape& shape) {
  std::vector<SummarySpec> distinct;
  for (const Method& method : shape.methods) {
    for (const SummarySpec& spec : method.summaries()) {
      if (std::find(distinct.begin(), distinct.end(), spec) == distinct.end()) {
        distinct.push_back(spec);
      }
    }
  }
  return distinct;
}

// The dimensions of a summary's entries (see PagedView).
StreamSpec summary_stream_spec(const SummarySpec& spec, int index, const StreamSpec& tokens) {
  StreamSpec stream = tokens;
  stream.kind = StreamKind::kSummary;
  stream.summary = index;
  if (spec.kind == SummaryKind::kMean) {
    stream.value_dim = 0;
  } else if (spec.kind == SummaryKind::kMinMax) {
    stream.value_dim = tokens.key_dim;
  }
  return stream;
}

// Whether stripes `right - 1` and `right` both exist: equal runs end with the context.
bool has_seam(const Layout& layout, int64_t right) {
  return right > 0 && right < layout.num_stripes();
}

}  // namespace

ShardMap::ShardMap(const ContextShape& shape, int rank)
    : rank_(rank), layout_(shape.layout), summaries_(distinct_summaries(shape)) {
  const StreamSpec tokens{
      StreamKind::kTokens, -1, shape.kv_dtype, shape.num_kv_heads, shape.key_dim, shape.value_dim};
  streams_.push_back(tokens);
  for (size_t i = 0; i < summaries_.size(); ++i) {
    const int index = static_cast<int>(i);
    const StreamSpec summary = summary_stream_spec(summaries_[i], index, tokens);
    streams_.push_back(summary);
    if (layout_.num_ranks > 1 && overlap(index) > 0) {
      StreamSpec seam = tokens;
      seam.kind = StreamKind::kSeam;
      seam.summary = index;
      StreamSpec halo = summary;
      halo.kind = StreamKind::kHalo;
      streams_.push_back(seam);
      streams_.push_back(halo);
    }
  }
}

int ShardMap::find_summary(const SummarySpec& spec) const {
  const auto found = std::find(summaries_.begin(), summaries_.end(), spec);
  return found == summaries_.end() ? -1 : static_cast<int>(found - summaries_.begin());
}

int ShardMap::find_stream(StreamKind kind, int summary) const {
  for (size_t i = 0; i < streams_.size(); ++i) {
    if (streams_[i].kind == kind && streams_[i].summary == summary) {
      return static_cast<int>(i);
    }
  }
  return -1;
}

int64_t ShardMap::overlap(int summary) const {
  const SummarySpec& spec = summaries_[static_cast<size_t>(summary)];
  return spec.span() - spec.stride();
}

int64_t ShardMap::seam_entry(int summary, int64_t local_stripe, int side) const {
  return (2 * local_stripe + side) * 2 * overlap(summary);
}

int64_t ShardMap::num_entries(int stream, int64_t num_tokens) const {
  const StreamSpec& spec = streams_[static_cast<size_t>(stream)];
  switch (spec.kind) {
    case StreamKind::kTokens:
      return layout_.local_length(rank_, num_tokens);
    case StreamKind::kSummary: {
      // Local windows begin where the rank's stripes do, and a stripe is whole strides.
      const SummarySpec& summary = summaries_[static_cast<size_t>(spec.summary)];
      const int64_t stride = summary.stride();
      return layout_.local_length(rank_, summary.num_entries(num_tokens) * stride) / stride;
    }
    case StreamKind::kSeam:
      return num_seam_entries(spec.summary, num_tokens);
    case StreamKind::kHalo:
      return num_halo_entries(spec.summary, num_tokens);
  }
  return 0;
}

int64_t ShardMap::num_seam_entries(int summary, int64_t num_tokens) const {
  const int64_t reach = overlap(summary);
  const int64_t stripe = layout_.stripe_tokens;
  // The last stripe of the rank whose seam has begun.
  int64_t local = divide_up(layout_.local_length(rank_, num_tokens + reach), stripe) - 1;
  for (; local >= 0; --local) {
    const int64_t begin = layout_.global_stripe(rank_, local) * stripe;
    for (const int side : {1, 0}) {
      const int64_t end_of_stripe = begin + side * stripe;
      const int64_t used = num_tokens - (end_of_stripe - reach);
      if (used > 0 && has_seam(layout_, end_of_stripe / stripe)) {
        return seam_entry(summary, local, side) + std::min(used, 2 * reach);
      }
    }
  }
  return 0;
}

int64_t ShardMap::num_halo_entries(int summary, int64_t num_tokens) const {
  const int64_t stride = summaries_[static_cast<size_t>(summary)].stride();
  const int64_t windows = overlap(summary) / stride;  // that reach into a stripe
  const int64_t length = layout_.local_length(rank_, num_tokens);
  if (length == 0) {
    return 0;
  }
  const int64_t stripe = layout_.stripe_tokens;
  const int64_t local = (length - 1) / stripe;
  const int64_t begin = layout_.global_stripe(rank_, local) * stripe;
  const int64_t complete = begin == 0 ? 0 : std::min(windows, (num_tokens - begin) / stride);
  return local * windows + complete;
}

std::vector<WriteSegment> ShardMap::owned_segments(int64_t begin, int64_t end) const {
  std::vector<WriteSegment> segments;
  const int64_t last = layout_.local_length(rank_, end);
  for (int64_t local = layout_.local_length(rank_, begin); local < last;) {
    const int64_t position = layout_.global_position(rank_, local);
    const int64_t rows = std::min(layout_.stripe_end(position), end) - position;
    segments.push_back({0, local, position, rows});
    local += rows;
  }
  return segments;
}

std::vector<WriteSegment> ShardMap::write_segments(int64_t begin, int64_t end) const {
  std::vector<WriteSegment> segments = owned_segments(begin, end);
  for (size_t summary = 0; summary < summaries_.size(); ++summary) {
    if (seam_stream(static_cast<int>(summary)) >= 0) {
      add_seam_segments(static_cast<int>(summary), begin, end, segments);
    }
  }
  return segments;
}

void ShardMap::add_seam_segments(int summary,
                                 int64_t begin,
                                 int64_t end,
                                 std::vector<WriteSegment>& segments) const {
  const int64_t reach = overlap(summary);
  const int64_t stripe = layout_.stripe_tokens;
  const int stream = seam_stream(summary);
  // Stripe ends whose seams [end - reach, end + reach) the rows touch, as far as this rank owns a
  // stripe on either side.
  const int64_t first = std::max<int64_t>(divide_up(begin - reach + 1, stripe), 1);
  const int64_t last = (end + reach - 1) / stripe;
  for (int64_t right = first; right <= last && has_seam(layout_, right); ++right) {
    const int64_t seam_begin = right * stripe - reach;
    const int64_t from = std::max(begin, seam_begin);
    const int64_t to = std::min(end, right * stripe + reach);
    if (from >= to) {
      continue;
    }
    for (const int64_t own : {right - 1, right}) {
      if (layout_.stripe_owner(own) != rank_) {
        continue;
      }
      const int64_t local = layout_.local_length(rank_, own * stripe) / stripe;
      const int64_t entry = seam_entry(summary, local, own == right ? 0 : 1);
      segments.push_back({stream, entry + from - seam_begin, from, to - from});
    }
  }
}

int64_t ShardMap::growth_bytes(int64_t begin, int64_t end, bool may_be_shared) const {
  const std::vector<WriteSegment> segments =
      may_be_shared ? write_segments(begin, end) : std::vector<WriteSegment>();
  int64_t bytes = 0;
  for (size_t i = 0; i < streams_.size(); ++i) {
    const int stream = static_cast<int>(i);
    const int64_t held = num_entries(stream, begin);
    const int64_t wanted = num_entries(stream, end);
    const int64_t held_pages = divide_up(held, kPageTokens);
    int64_t pages = divide_up(wanted, kPageTokens) - held_pages;
    if (may_be_shared) {
      int64_t first_written = wanted > held ? held : held_pages * kPageTokens;
      for (const WriteSegment& segment : segments) {
        if (segment.stream == stream) {
          first_written = std::min(first_written, segment.first_entry);
        }
      }
      pages += std::max<int64_t>(held_pages - first_written / kPageTokens, 0);
    }
    bytes += pages * PagePool::charge(streams_[i].page_bytes());
  }
  return bytes;
}

ShardMap::Bytes ShardMap::held_bytes(int64_t num_tokens) const {
  Bytes bytes;
  for (size_t i = 0; i < streams_.size(); ++i) {
    const int64_t pages = divide_up(num_entries(static_cast<int>(i), num_tokens), kPageTokens);
    const int64_t held = pages * PagePool::charge(streams_[i].page_bytes());
    (streams_[i].kind == StreamKind::kTokens ? bytes.tokens : bytes.summaries) += held;
  }
  return bytes;
}

}  // namespace longspan
