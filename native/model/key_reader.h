// KeyReader: reads a GGUF's keys by name and type; every error names the file and the key.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gguf/gguf_file.h"

namespace pydiffusion {

class KeyReader {
  public:
    // architecture: general.architecture, the prefix of the model's own keys.
    KeyReader(const GgufFile& file, std::string architecture)
        : file_(file), architecture_(std::move(architecture)) {}

    // "block_count" -> "diffusion-gemma.block_count"
    std::string own(const std::string& key) const { return architecture_ + "." + key; }

    [[noreturn]] void refuse(const std::string& key, const std::string& what) const;
    [[noreturn]] void unsupported(const std::string& key, const std::string& what) const;

    bool has(const std::string& key) const { return file_.find(key) != nullptr; }
    const Value& require(const std::string& key) const;
    // Ranges are inclusive. Any integer type is accepted, as a scalar or an array of equal values.
    int32_t integer(const std::string& key, int64_t low, int64_t high) const;
    int32_t integer_or(const std::string& key, int32_t fallback, int64_t low, int64_t high) const;
    // One entry per element of an array, one for a scalar.
    std::vector<int64_t> integers(const std::string& key) const;
    // A scalar counts for every layer.
    std::vector<int32_t> per_layer(const std::string& key, int32_t n_layer, int64_t low, int64_t high) const;
    // NaN fails every range.
    float number(const std::string& key, double low, double high) const;
    float number_or(const std::string& key, float fallback, double low, double high) const;
    std::string text(const std::string& key) const;

  private:
    void check_range(const std::string& key, int64_t value, int64_t low, int64_t high) const;

    const GgufFile& file_;
    std::string architecture_;
};

}  // namespace pydiffusion
