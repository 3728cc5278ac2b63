// PromptImage: an image in a prompt, whose features take the place of its soft tokens' embeddings.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace pydiffusion {

struct PromptImage {
    int32_t begin, end;  // its soft tokens: indices in a prompt, or positions in a cache
    std::shared_ptr<const std::vector<float>> features;  // n_embd floats per soft token
    std::string key;                                     // equal for equal features

    int32_t n_tokens() const { return end - begin; }
};

}  // namespace pydiffusion
