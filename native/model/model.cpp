#include "model/model.h"

#include <algorithm>

namespace pydiffusion {

Model::Model(std::shared_ptr<const GgufFile> f, int n_threads, const std::string& device,
             const std::string& kernels, const DevicePlan& p, const std::function<void(double)>& progress)
    : file(std::move(f)),
      hparams(*file),
      backend(n_threads, device, kernels),
      device_plan(p),
      weights(file, hparams, device_plan, backend, progress) {
    if (!backend.on_device()) read_into_memory(*file, progress);  // else the upload has read it
}

void read_into_memory(const GgufFile& file, const std::function<void(double)>& progress) {
    constexpr uint64_t page = 4096, block = uint64_t{64} << 20;
    const double n_bytes = static_cast<double>(file.n_bytes_of_all_parts());
    uint64_t n_read = 0;
    uint8_t sum = 0;
    for (size_t i = 0; i < file.n_parts(); ++i) {
        const GgufFile& part = file.part(i);
        for (uint64_t begin = 0; begin < part.n_bytes(); begin += block) {
            const uint64_t end = std::min(begin + block, part.n_bytes());
            file.require_not_truncated();
            for (uint64_t at = begin; at < end; at += page)
                sum ^= *(static_cast<const volatile uint8_t*>(part.data()) + at);
            n_read += end - begin;
            progress(static_cast<double>(n_read) / n_bytes);
        }
    }
    (void)sum;
}

}  // namespace pydiffusion
