// Fuzz target: GgufFile on raw bytes and nearly valid headers. Expects a typed error or a consistent file.
#include "file_check.h"
#include "memory_file.h"
#include "util/error.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    // Half of the inputs get a data section of zeros; otherwise most would be refused as truncated, before
    // the later checks.
    const size_t n_zeros = size % 2 ? size_t{1} << 20 : 0;
    try {
        check_file(pydiffusion::GgufFile(memory_file(data, size, n_zeros)));
    } catch (const pydiffusion::Error& error) {
        require(std::string(error.what()).find('\n') == std::string::npos);
    }
    return 0;
}
