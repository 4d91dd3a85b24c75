// The items of one Decode, or of one step of a DecodeStream, on their way through the lead.
#pragma once

#include <atomic>
#include <set>
#include <string>

#include "absl/functional/any_invocable.h"

#include "longspan/v1/attention.pb.h"

#include "base/status.h"
#include "worker/lead.h"
#include "worker/service.h"

namespace longspan {

using DecodeItems = google::protobuf::RepeatedPtrField<v1::DecodeItem>;
using DecodeResults = google::protobuf::RepeatedPtrField<v1::DecodeResult>;

// Writes one result an item, each with a status of its own, then calls `done` once; or calls it
// with an error of the batch as a whole, when the results mean nothing. `allowed`: the contexts
// that items may name, null for any. Everything outlives the call of `done`.
void run_decode_batch(const ServiceEnvironment& environment,
                      const DecodeItems& items,
                      DecodeResults& results,
                      const std::set<std::string>* allowed,
                      CallTerms terms,
                      absl::AnyInvocable<void(Status)> done);

}  // namespace longspan
