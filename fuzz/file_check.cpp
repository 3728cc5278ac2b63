#include "file_check.h"

#include <algorithm>
#include <cstdlib>
#include <tuple>

void require(bool ok) {
    if (!ok) std::abort();
}

void check_file(const pydiffusion::GgufFile& file) {
    for (const std::string& key : file.keys()) {
        const pydiffusion::Value* value = file.find(key);
        require(value != nullptr && !value->type_name().empty());
        require(!value->is_array || value->array_length() <= file.n_bytes_of_all_parts());
    }
    std::vector<std::tuple<size_t, uint64_t, uint64_t>> ranges;  // part, begin, end
    for (const pydiffusion::TensorInfo& tensor : file.tensors()) {
        require(file.find_tensor(tensor.name) == &tensor && tensor.part < file.n_parts());
        const pydiffusion::GgufFile& part = file.part(tensor.part);
        require(!tensor.shape().empty() && tensor.n_elements() > 0 && tensor.n_bytes > 0);
        require(tensor.offset >= part.data_offset() && tensor.n_bytes <= part.n_bytes());
        require(tensor.offset <= part.n_bytes() - tensor.n_bytes);
        const volatile uint8_t* data = file.tensor_data(tensor);
        (void)data[0];
        (void)data[tensor.n_bytes - 1];
        ranges.emplace_back(tensor.part, tensor.offset, tensor.offset + tensor.n_bytes);
    }
    std::sort(ranges.begin(), ranges.end());
    for (size_t i = 1; i < ranges.size(); ++i) {
        const auto& [part, begin, end] = ranges[i];
        require(std::get<0>(ranges[i - 1]) != part || std::get<2>(ranges[i - 1]) <= begin);
    }
}
