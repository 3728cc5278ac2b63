// The file layer on raw bytes and on nearly valid headers: it refuses with a typed error, or what it says of
// the file is true.
#include <algorithm>
#include <cstdlib>

#include "errors.h"
#include "file.h"
#include "memory_file.h"

namespace {

// Not assert(), which a release build would drop.
void require(bool ok) {
    if (!ok) std::abort();
}

void check(const pydiffusion::File& file) {
    for (const std::string& key : file.keys()) {
        const pydiffusion::Value* value = file.find(key);
        require(value != nullptr && !value->type_name().empty());
        require(!value->is_array || value->array_length() <= file.n_bytes());
    }
    std::vector<std::pair<uint64_t, uint64_t>> ranges;
    for (const pydiffusion::TensorInfo& tensor : file.tensors()) {
        require(file.find_tensor(tensor.name) == &tensor);
        require(!tensor.shape().empty() && tensor.n_elements() > 0 && tensor.n_bytes > 0);
        require(tensor.offset >= file.data_offset() && tensor.n_bytes <= file.n_bytes());
        require(tensor.offset <= file.n_bytes() - tensor.n_bytes);
        const volatile uint8_t* data = file.tensor_data(tensor);
        (void)data[0];
        (void)data[tensor.n_bytes - 1];
        ranges.emplace_back(tensor.offset, tensor.offset + tensor.n_bytes);
    }
    std::sort(ranges.begin(), ranges.end());
    for (size_t i = 1; i < ranges.size(); ++i) require(ranges[i - 1].second <= ranges[i].first);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    // A zero or a data section behind it: what is refused as truncated would else hide what comes later.
    const size_t n_zeros = size % 2 ? size_t{1} << 20 : 0;
    try {
        check(pydiffusion::File(memory_file(data, size, n_zeros)));
    } catch (const pydiffusion::Error& error) {
        require(std::string(error.what()).find('\n') == std::string::npos);
    }
    return 0;
}
