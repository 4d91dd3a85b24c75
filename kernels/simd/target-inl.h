// The table of one target, after its macros are set.
#pragma once

#include "kernels/simd/attend-inl.h"
#include "kernels/simd/merge-inl.h"
#include "kernels/simd/search-inl.h"
#include "kernels/simd/summarize-inl.h"
#include "kernels/simd/target.h"

namespace longspan::simd {
namespace {

constexpr Target make_target(absl::string_view name, absl::string_view detail) {
  return {
      .name = name,
      .detail = detail,
      .begin_tile = begin_tile,
      .attend_page = attend_page,
      .score_page = score_page,
      .above = above,
      .score_anchors = score_anchors,
      .pool_rows = pool_rows,
      .merge_rows = merge_rows,
  };
}

}  // namespace
}  // namespace longspan::simd
