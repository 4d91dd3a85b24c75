// The four stages in double precision, as params.h describes them.
#pragma once

#include "kernels/params.h"

namespace longspan::reference {

void summarize(const SummarizeParams& params);
void search(const SearchParams& params);
void attend(const AttendParams& params);
void merge(const MergeParams& params);

}  // namespace longspan::reference
