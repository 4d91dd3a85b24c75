#include "worker/rank.h"

namespace longspan {

AnchorTable& Rank::anchors(const SearchSpec& search) {
  for (NamedTable& named : anchor_tables_) {
    if (named.power == search.anchor_power && named.first_stripe == search.anchor_first_stripe) {
      return named.table;
    }
  }
  return anchor_tables_
      .emplace_back(
          NamedTable{search.anchor_power, search.anchor_first_stripe, AnchorTable(search)})
      .table;
}

}  // namespace longspan
