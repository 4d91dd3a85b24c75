// libFuzzer's way into the target: configure with clang and -DLONGSPAN_FUZZERS=ON, run
// bin/decode_fuzzer.
#include <cstddef>
#include <cstdint>

#include "tests/fuzz/decode_target.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  longspan::decode_anything({data, size});
  return 0;
}
