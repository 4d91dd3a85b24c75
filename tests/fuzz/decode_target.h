// What both fuzzers feed: everything that the service does with bytes of a stranger before the
// engine sees them.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace longspan {

// The first byte chooses the message, the rest is its bytes. Must not crash, whatever they are.
void decode_anything(std::span<const uint8_t> input);

// Valid inputs to start from.
std::vector<std::vector<uint8_t>> decode_seeds();

}  // namespace longspan
