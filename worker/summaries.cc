#include "worker/summaries.h"

#include <algorithm>

namespace longspan {
namespace {

// One summary of one layer while it is brought up to date.
class Updater {
 public:
  Updater(ShardStore& store, ContextShard& shard, int layer, int summary, int64_t num_tokens)
      : store_(store),
        shard_(shard),
        map_(shard.map),
        layer_(layer),
        summary_(summary),
        spec_(shard.map.summaries()[static_cast<size_t>(summary)]),
        num_tokens_(num_tokens) {}

  // Entries [first, end) of the summary stream, in runs that read one stream each.
  Status update_entries(int64_t first, int64_t end, Backend& backend, Stream& stream) {
    const int out = map_.summary_stream(summary_);
    LONGSPAN_RETURN_IF_ERROR(store_.make_writable(shard_, layer_, out, first, end - first));
    const int seam = map_.seam_stream(summary_);
    if (seam < 0) {
      return make(0, first, end - first, out, first, backend, stream);
    }
    const int64_t stride = spec_.stride();
    const int64_t per_stripe = map_.layout().stripe_tokens / stride;
    const int64_t crossing = map_.overlap(summary_) / stride;
    for (int64_t entry = first; entry < end;) {
      const int64_t local_stripe = entry / per_stripe;
      const int64_t inside_end = (local_stripe + 1) * per_stripe - crossing;
      if (entry < inside_end) {
        const int64_t count = std::min(end, inside_end) - entry;
        LONGSPAN_RETURN_IF_ERROR(make(0, entry, count, out, entry, backend, stream));
        entry += count;
      } else {
        const int64_t count = std::min(end, inside_end + crossing) - entry;
        const int64_t in_seam =
            map_.seam_entry(summary_, local_stripe, 1) / stride + entry - inside_end;
        LONGSPAN_RETURN_IF_ERROR(make(seam, in_seam, count, out, entry, backend, stream));
        entry += count;
      }
    }
    return absl::OkStatus();
  }

  // Entries [first, end) of the halo stream, from the seams before the rank's stripes.
  Status update_halo(int64_t first, int64_t end, Backend& backend, Stream& stream) {
    const int halo = map_.halo_stream(summary_);
    LONGSPAN_RETURN_IF_ERROR(store_.make_writable(shard_, layer_, halo, first, end - first));
    const int64_t crossing = map_.overlap(summary_) / spec_.stride();
    for (int64_t entry = first; entry < end;) {
      const int64_t local_stripe = entry / crossing;
      const int64_t count = std::min(end, (local_stripe + 1) * crossing) - entry;
      if (map_.layout().global_stripe(map_.rank(), local_stripe) > 0) {
        const int64_t in_seam =
            map_.seam_entry(summary_, local_stripe, 0) / spec_.stride() + entry % crossing;
        LONGSPAN_RETURN_IF_ERROR(
            make(map_.seam_stream(summary_), in_seam, count, halo, entry, backend, stream));
      }
      entry += count;
    }
    return absl::OkStatus();
  }

 private:
  Status make(int from,
              int64_t first_entry,
              int64_t num_entries,
              int to,
              int64_t first_out,
              Backend& backend,
              Stream& stream) {
    SummarizeParams params;
    params.spec = &spec_;
    params.tokens = store_.view(shard_, layer_, from, map_.num_entries(from, num_tokens_));
    params.first_entry = first_entry;
    params.num_entries = num_entries;
    params.out = store_.view(shard_, layer_, to, first_out + num_entries);
    params.first_out = first_out;
    return backend.summarize(params, stream);
  }

  ShardStore& store_;
  ContextShard& shard_;
  const ShardMap& map_;
  const int layer_;
  const int summary_;
  const SummarySpec& spec_;
  const int64_t num_tokens_;
};

}  // namespace

Status update_summaries(ShardStore& store,
                        ContextShard& shard,
                        int layer,
                        int64_t begin,
                        int64_t end,
                        Backend& backend,
                        Stream& stream) {
  const ShardMap& map = shard.map;
  for (int summary = 0; summary < static_cast<int>(map.summaries().size()); ++summary) {
    Updater updater(store, shard, layer, summary, end);
    const int entries = map.summary_stream(summary);
    const int64_t first = map.num_entries(entries, begin);
    const int64_t last = map.num_entries(entries, end);
    if (first < last) {
      LONGSPAN_RETURN_IF_ERROR(updater.update_entries(first, last, backend, stream));
    }
    const int halo = map.halo_stream(summary);
    const int64_t first_halo = halo < 0 ? 0 : map.num_entries(halo, begin);
    const int64_t last_halo = halo < 0 ? 0 : map.num_entries(halo, end);
    if (first_halo < last_halo) {
      LONGSPAN_RETURN_IF_ERROR(updater.update_halo(first_halo, last_halo, backend, stream));
    }
  }
  return absl::OkStatus();
}

}  // namespace longspan
