// What a rank keeps of one layer of a context, and how much of it at a given length: pure functions
// of the context's shape, so that the lead can tell what any rank will need.
//
// A stream is a run of entries in pages of 64:
//   tokens   the rank's own keys and values, by local token
//   summary  one for each distinct summary of the context's methods, by local block or window
// and, where compressed windows overlap (l > d) and tokens are spread over several ranks, for each
// such summary
//   seam     the l - d tokens on either side of a stripe's end, kept by the owners of both stripes,
//            so that each can make the windows that cross the end from the same bytes
//   halo     the windows that begin before a stripe and reach into it (SearchParams::halo)
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/params.h"
#include "worker/group.h"

namespace longspan {

enum class StreamKind : uint8_t { kTokens, kSummary, kSeam, kHalo };

struct StreamSpec {
  StreamKind kind = StreamKind::kTokens;
  int summary = -1;  // place in ShardMap::summaries()
  DataType dtype = DataType::kBFloat16;
  int num_kv_heads = 0;
  int key_dim = 0;
  int value_dim = 0;

  size_t page_bytes() const {
    return PagedView{nullptr, 0, dtype, num_kv_heads, key_dim, value_dim}.page_bytes();
  }
};

// Token rows [first_token, first_token + num_rows) of the context belong into a stream's entries
// from `first_entry` on.
struct WriteSegment {
  int stream = 0;
  int64_t first_entry = 0;
  int64_t first_token = 0;
  int64_t num_rows = 0;
};

// Immutable; one for each (context, rank).
class ShardMap {
 public:
  ShardMap(const ContextShape& shape, int rank);

  int rank() const { return rank_; }
  const Layout& layout() const { return layout_; }
  std::span<const StreamSpec> streams() const { return streams_; }
  std::span<const SummarySpec> summaries() const { return summaries_; }
  // Places in summaries() and streams(), -1 where there is none.
  int find_summary(const SummarySpec& spec) const;
  int summary_stream(int summary) const { return find_stream(StreamKind::kSummary, summary); }
  int seam_stream(int summary) const { return find_stream(StreamKind::kSeam, summary); }
  int halo_stream(int summary) const { return find_stream(StreamKind::kHalo, summary); }

  // Entries of a stream that a layer of `num_tokens` tokens uses (of seams: up to the last one).
  int64_t num_entries(int stream, int64_t num_tokens) const;
  // Where the rows [begin, end) go on this rank, in ascending order within each stream.
  std::vector<WriteSegment> write_segments(int64_t begin, int64_t end) const;
  // The same without copies: each row at its owner alone.
  std::vector<WriteSegment> owned_segments(int64_t begin, int64_t end) const;

  // Bytes of new pages that growing a layer from `begin` to `end` tokens takes at most; with
  // `may_be_shared`, the copies of pages that another context holds too are counted.
  int64_t growth_bytes(int64_t begin, int64_t end, bool may_be_shared) const;

  // Bytes of the pages that a layer of `num_tokens` tokens takes, shared ones included.
  struct Bytes {
    int64_t tokens = 0;
    int64_t summaries = 0;  // and their seams
  };
  Bytes held_bytes(int64_t num_tokens) const;

  // Overlap of the windows of a compressed summary: l - d.
  int64_t overlap(int summary) const;
  // Entry of the seam before (side 0) or after (side 1) a local stripe.
  int64_t seam_entry(int summary, int64_t local_stripe, int side) const;

 private:
  int find_stream(StreamKind kind, int summary) const;
  int64_t num_seam_entries(int summary, int64_t num_tokens) const;
  int64_t num_halo_entries(int summary, int64_t num_tokens) const;
  void add_seam_segments(int summary,
                         int64_t begin,
                         int64_t end,
                         std::vector<WriteSegment>& segments) const;

  const int rank_;
  const Layout layout_;
  std::vector<SummarySpec> summaries_;
  std::vector<StreamSpec> streams_;
};

}  // namespace longspan
