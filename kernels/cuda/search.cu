// Portable search: a block for each list and split scores candidates in double precision, a few
// lanes for each, and keeps the best in a queue. Splits of a list are joined by a second kernel.
#include <algorithm>

#include "kernels/cuda/candidate_queue.h"
#include "kernels/cuda/convert.h"
#include "kernels/cuda/portable.h"

namespace longspan::cuda {
namespace {

__device__ double nan_to_lowest(double score) { return isnan(score) ? -INFINITY : score; }

// One list of one row: the score heads that are reduced to it, and its candidates.
struct List {
  int64_t row;
  int64_t index;   // row * S + s
  int first_head;  // of the score heads
  int num_heads;   // one without head_reduce
  int64_t k;
  int64_t first;  // block id, or place in args.candidates for anchors
  int64_t num_candidates;

  __device__ int64_t id(const SearchArgs& args, int64_t place) const {
    return args.anchors ? args.candidates[first + place] : first + place;
  }
};

__device__ List list_of(const SearchArgs& args, int64_t index) {
  List list;
  list.row = index / args.num_lists;
  list.index = index;
  list.num_heads = args.num_score_heads / args.num_lists;
  list.first_head = static_cast<int>(index % args.num_lists) * list.num_heads;
  list.k = min(args.k[list.row], args.max_k);
  list.first = args.anchors ? args.candidate_offsets[list.row] : args.candidate_begin[list.row];
  const int64_t end =
      args.anchors ? args.candidate_offsets[list.row + 1] : args.candidate_end[list.row];
  list.num_candidates = max(end - list.first, int64_t{0});
  return list;
}

// The queries of a list's heads after query_reduce, into head_queries [num_heads][D].
__device__ void reduce_queries(const SearchArgs& args, const List& list, double* head_queries) {
  const int dim = args.view.key_dim;
  const int group = args.num_query_heads / args.view.num_kv_heads;
  for (int i = static_cast<int>(threadIdx.x); i < list.num_heads * dim; i += blockDim.x) {
    const int head = list.first_head + i / dim;
    int first = head;
    int count = 1;
    if (args.query_reduce == QueryReduce::kGroupMean) {
      first = head * group;
      count = group;
    } else if (args.query_reduce == QueryReduce::kAllMean) {
      first = 0;
      count = args.num_query_heads;
    }
    double mean = 0.0;
    for (int h = first; h < first + count; ++h) {
      mean +=
          static_cast<double>(args.query[(list.row * args.num_query_heads + h) * dim + i % dim]) /
          count;
    }
    head_queries[i] = mean;
  }
}

// The lanes that score a candidate together.
struct Team {
  int lanes;      // a power of two, 32 at most
  int lane;       // of this thread
  int index;      // in the block
  unsigned mask;  // of its lanes in their warp

  __device__ explicit Team(int num_lanes)
      : lanes(num_lanes),
        lane(static_cast<int>(threadIdx.x) % num_lanes),
        index(static_cast<int>(threadIdx.x) / num_lanes) {
    const unsigned all = num_lanes == kWarpSize ? ~0U : (1U << num_lanes) - 1U;
    mask = all << (threadIdx.x % kWarpSize / num_lanes * num_lanes);
  }
  __device__ double sum(double value) const {
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      value += __shfl_xor_sync(mask, value, offset);
    }
    return value;
  }
};

// Scores of candidates for one head, each by a team; `query` [D] is the head's.
template <class T>
class Scorer {
 public:
  __device__ Scorer(const SearchArgs& args, int64_t row, const Team& team)
      : args_(args), row_(row), team_(team) {}

  __device__ double operator()(const double* query, int score_head, int64_t candidate) const {
    const bool reduced = args_.query_reduce != QueryReduce::kNone;
    const int group = args_.num_query_heads / args_.view.num_kv_heads;
    const int kv_head = reduced ? score_head : score_head / group;
    if (args_.softmax) {
      const float lse = args_.lse[row_ * args_.num_query_heads + (reduced ? 0 : score_head)];
      return importance(query, kv_head, lse, candidate);
    }
    return args_.bound ? bound(query, kv_head, candidate)
                       : dot(query, args_.view, kv_head, candidate);
  }

 private:
  static constexpr int kVector = kVectorSize<T>;

  __device__ double dot(const double* query,
                        const PagedView& view,
                        int kv_head,
                        int64_t entry) const {
    const T* key = reinterpret_cast<const T*>(view.key(entry, kv_head));
    double sum = 0.0;
    for (int d = team_.lane * kVector; d < view.key_dim; d += team_.lanes * kVector) {
      float elements[kVector];
      load_vector(key + d, elements);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        sum += query[d + i] * elements[i];
      }
    }
    return team_.sum(sum);
  }

  // Quest: no key between the minima and maxima of a block has a larger dot product.
  __device__ double bound(const double* query, int kv_head, int64_t entry) const {
    const T* minima = reinterpret_cast<const T*>(args_.view.key(entry, kv_head));
    const T* maxima = reinterpret_cast<const T*>(args_.view.value(entry, kv_head));
    double sum = 0.0;
    for (int d = team_.lane * kVector; d < args_.view.key_dim; d += team_.lanes * kVector) {
      float low_elements[kVector];
      float high_elements[kVector];
      load_vector(minima + d, low_elements);
      load_vector(maxima + d, high_elements);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const double low = query[d + i] * low_elements[i];
        const double high = query[d + i] * high_elements[i];
        sum += isnan(low) || isnan(high) ? NAN : fmax(low, high);
      }
    }
    return team_.sum(sum);
  }

  // NSA: the sum over the windows that overlap a block of overlap / stride * exp(logit - lse).
  // Windows of a stripe start in it; the ones that reach into it from before are in the halo.
  __device__ double importance(const double* query, int kv_head, float lse, int64_t block) const {
    const int64_t length = args_.window_tokens;
    const int64_t stride = args_.stride_tokens;
    const int64_t block_begin = block * args_.block_tokens;
    const int64_t stripe = args_.stripe_tokens > 0 ? block_begin / args_.stripe_tokens : 0;
    const int64_t stripe_begin = stripe * args_.stripe_tokens;
    double sum = 0.0;

    const int64_t num_before = length / stride - 1;
    const bool has_halo = args_.halo.pages != nullptr && !(args_.starts_context && stripe == 0);
    for (int64_t m = 0; has_halo && m < num_before; ++m) {
      const double weight = overlap(stripe_begin - (num_before - m) * stride, block_begin);
      if (weight > 0.0) {
        sum += weight * probability(query, args_.halo, kv_head, lse, stripe * num_before + m);
      }
    }
    // The quotient is rounded towards 0, and a negative one is as good as any other.
    const int64_t first =
        max(max(stripe_begin / stride, (block_begin - length) / stride + 1), int64_t{0});
    const int64_t end =
        min(args_.visible_entries[row_], (block_begin + args_.block_tokens) / stride);
    for (int64_t entry = first; entry < end; ++entry) {
      sum += overlap(entry * stride, block_begin) *
             probability(query, args_.view, kv_head, lse, entry);
    }
    return sum;
  }

  // In strides; 0 when they do not meet.
  __device__ double overlap(int64_t window_begin, int64_t block_begin) const {
    const int64_t begin = max(window_begin, block_begin);
    const int64_t end = min(window_begin + args_.window_tokens, block_begin + args_.block_tokens);
    return fmax(0.0, static_cast<double>(end - begin) / static_cast<double>(args_.stride_tokens));
  }

  __device__ double probability(
      const double* query, const PagedView& windows, int kv_head, float lse, int64_t entry) const {
    const double scaled = args_.scale * dot(query, windows, kv_head, entry);
    const double logit =
        args_.soft_cap > 0.0F ? args_.soft_cap * tanh(scaled / args_.soft_cap) : scaled;
    return exp(logit - lse);
  }

  const SearchArgs& args_;
  int64_t row_;
  const Team& team_;
};

// A candidate's score after head_reduce, as it is compared.
template <class T>
__device__ float reduced_score(const SearchArgs& args,
                               const Scorer<T>& scorer,
                               const List& list,
                               const double* head_queries,  // [num_heads][D]
                               int64_t candidate) {
  const HeadReduce reduce = args.head_reduce;
  const bool maximum = reduce == HeadReduce::kAllMax || reduce == HeadReduce::kGroupMax;
  const bool mean = reduce == HeadReduce::kAllMean || reduce == HeadReduce::kGroupMean;
  double result = maximum ? -INFINITY : 0.0;
  for (int i = 0; i < list.num_heads; ++i) {
    const double score =
        nan_to_lowest(scorer(head_queries + i * args.view.key_dim, list.first_head + i, candidate));
    result = maximum ? fmax(result, score) : result + score;
  }
  return static_cast<float>(nan_to_lowest(mean ? result / list.num_heads : result));
}

// Pushes the candidates [begin, end) of a list, counted along the list.
template <class T>
__device__ void push_candidates(const SearchArgs& args,
                                const List& list,
                                const double* head_queries,
                                int lanes,
                                int64_t begin,
                                int64_t end,
                                CandidateQueue& queue) {
  const Team team(lanes);
  const Scorer<T> scorer(args, list.row, team);
  const int num_teams = kSearchThreads / lanes;
  for (int64_t first = begin; first < end; first += kSearchThreads) {
    CandidateKey own = 0;  // a team scores one candidate for each of its lanes
    for (int i = 0; i < lanes; ++i) {
      const int64_t place = first + i * num_teams + team.index;
      if (place < end) {
        const float score = reduced_score(args, scorer, list, head_queries, list.id(args, place));
        own = i == team.lane ? candidate_key(score, place) : own;
      }
    }
    queue.push(own);
  }
}

__device__ void write_list(const SearchArgs& args, const List& list, const CandidateQueue& queue) {
  for (int64_t i = threadIdx.x; i < args.max_k; i += blockDim.x) {
    const bool used = i < queue.size();
    const int64_t out = list.index * args.max_k + i;
    args.scores[out] = used ? score_of(queue[i]) : -INFINITY;
    args.ids[out] = used ? list.id(args, place_of(queue[i])) : -1;
  }
}

__device__ CandidateKey* queue_keys(const SearchArgs& args, CandidateKey* shared) {
  return args.buffers == nullptr ? shared : args.buffers + blockIdx.x * args.queue_capacity;
}

template <class T>
__global__ void __launch_bounds__(kSearchThreads)
    score_kernel(const __grid_constant__ SearchArgs args, int lanes) {
  extern __shared__ CandidateKey shared_keys[];
  __shared__ QueueState state;
  CandidateKey* keys = queue_keys(args, shared_keys);
  const int heads_of_list = args.num_score_heads / args.num_lists;
  double* head_queries =
      args.head_queries + int64_t{blockIdx.x} * heads_of_list * args.view.key_dim;
  const int64_t num_items = args.num_rows * args.num_lists * args.num_splits;
  for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const List list = list_of(args, item / args.num_splits);
    const int64_t split = item % args.num_splits;
    CandidateQueue queue(state, keys, args.queue_capacity, list.k);
    reduce_queries(args, list, head_queries);
    __syncthreads();
    push_candidates<T>(args,
                       list,
                       head_queries,
                       lanes,
                       list.num_candidates * split / args.num_splits,
                       list.num_candidates * (split + 1) / args.num_splits,
                       queue);
    queue.sort();
    if (args.num_splits == 1) {
      write_list(args, list, queue);
      continue;
    }
    CandidateKey* part = args.part_keys + item * args.max_k;
    for (int64_t i = threadIdx.x; i < args.max_k; i += blockDim.x) {
      part[i] = i < queue.size() ? queue[i] : 0;
    }
  }
}

__global__ void __launch_bounds__(kSearchThreads)
    join_kernel(const __grid_constant__ SearchArgs args) {
  extern __shared__ CandidateKey shared_keys[];
  __shared__ QueueState state;
  CandidateKey* keys = queue_keys(args, shared_keys);
  const int64_t num_keys = args.num_splits * args.max_k;
  for (int64_t index = blockIdx.x; index < args.num_rows * args.num_lists; index += gridDim.x) {
    const List list = list_of(args, index);
    CandidateQueue queue(state, keys, args.queue_capacity, list.k);
    const CandidateKey* parts = args.part_keys + index * num_keys;
    for (int64_t first = 0; first < num_keys; first += blockDim.x) {
      const int64_t i = first + threadIdx.x;
      queue.push(i < num_keys ? parts[i] : 0);
    }
    queue.sort();
    write_list(args, list, queue);
  }
}

// The power of two, 32 at most, of lanes that share a candidate: each has a vector, if there are
// enough.
int lanes_of_candidate(int num_vectors) {
  int lanes = 1;
  while (lanes < kWarpSize && lanes * 2 <= num_vectors) {
    lanes *= 2;
  }
  return lanes;
}

}  // namespace

cudaError_t launch_search(const SearchArgs& args, cudaStream_t stream) {
  const int64_t num_lists = args.num_rows * args.num_lists;
  if (num_lists == 0 || args.max_k == 0) {
    return cudaSuccess;
  }
  const size_t shared_bytes =
      args.buffers == nullptr ? static_cast<size_t>(args.queue_capacity) * sizeof(CandidateKey) : 0;
  const cudaError_t scored = with_element_type(args.view.dtype, [&]<class T>(T) {
    const int lanes = lanes_of_candidate(args.view.key_dim / kVectorSize<T>);
    score_kernel<T>
        <<<static_cast<unsigned>(args.num_blocks), kSearchThreads, shared_bytes, stream>>>(args,
                                                                                           lanes);
    return cudaGetLastError();
  });
  if (scored != cudaSuccess || args.num_splits == 1) {
    return scored;
  }
  const auto num_blocks = static_cast<unsigned>(std::min(args.num_blocks, num_lists));
  join_kernel<<<num_blocks, kSearchThreads, shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace longspan::cuda
