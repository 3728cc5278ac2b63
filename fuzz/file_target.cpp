// The file layer on raw bytes and on nearly valid headers: it refuses with a typed error, or what it says of
// the file is true.
#include "util/error.h"
#include "file_check.h"
#include "memory_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    // A zero or a data section behind it: what is refused as truncated would else hide what comes later.
    const size_t n_zeros = size % 2 ? size_t{1} << 20 : 0;
    try {
        check_file(pydiffusion::GgufFile(memory_file(data, size, n_zeros)));
    } catch (const pydiffusion::Error& error) {
        require(std::string(error.what()).find('\n') == std::string::npos);
    }
    return 0;
}
