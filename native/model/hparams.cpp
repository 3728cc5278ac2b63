#include "model/hparams.h"

#include <algorithm>
#include <cmath>

#include "util/error.h"

namespace pydiffusion {

namespace {

constexpr char kArchitecture[] = "diffusion-gemma";

// Reads keys by name and type; every error names the file and the key.
class KeyReader {
  public:
    explicit KeyReader(const GgufFile& file) : file_(file) {}

    static std::string arch_key(const std::string& key) { return std::string(kArchitecture) + "." + key; }

    [[noreturn]] void refuse(const std::string& key, const std::string& what) const {
        throw Error(ErrorKind::format, file_.path() + ": key " + quoted(key) + " " + what);
    }

    [[noreturn]] void unsupported(const std::string& key, const std::string& what) const {
        throw Error(ErrorKind::unsupported, file_.path() + ": key " + quoted(key) + " " + what);
    }

    bool has(const std::string& key) const { return file_.find(key) != nullptr; }

    // Any integer type is accepted, as a scalar or an array; returns one entry per element.
    std::vector<int64_t> integers(const std::string& key) const {
        const Value& value = require(key);
        if (value.is_array) {
            if (value.integers.empty())
                refuse(key, "must be a non-empty array of integers, but is " + describe(value));
            return value.integers;
        }
        if (const auto* number = std::get_if<int64_t>(&value.scalar)) return {*number};
        if (const auto* flag = std::get_if<bool>(&value.scalar)) return {*flag ? 1 : 0};
        if (const auto* number = std::get_if<uint64_t>(&value.scalar)) {
            return {static_cast<int64_t>(std::min<uint64_t>(*number, INT64_MAX))};
        }
        refuse(key, "must be an integer, but is " + describe(value));
    }

    int32_t integer(const std::string& key, int64_t low, int64_t high) const {
        const std::vector<int64_t> all = integers(key);
        for (const int64_t value : all) {
            if (value != all[0]) unsupported(key, "differs between layers: not supported");
            check_range(key, value, low, high);
        }
        return static_cast<int32_t>(all[0]);
    }

    int32_t integer_or(const std::string& key, int32_t fallback, int64_t low, int64_t high) const {
        return has(key) ? integer(key, low, high) : fallback;
    }

    std::vector<int32_t> per_layer(const std::string& key, int32_t n_layer, int64_t low, int64_t high) const {
        const std::vector<int64_t> all = integers(key);
        const bool scalar = !require(key).is_array;
        if (!scalar && all.size() != static_cast<size_t>(n_layer)) {
            refuse(key, format("has %zu entries for %d layers", all.size(), n_layer));
        }
        std::vector<int32_t> result;
        for (int32_t i = 0; i < n_layer; ++i) {
            const int64_t value = all[scalar ? 0 : i];
            check_range(key, value, low, high);
            result.push_back(static_cast<int32_t>(value));
        }
        return result;
    }

    // Inclusive range; NaN fails it.
    float number(const std::string& key, double low, double high) const {
        const Value& value = require(key);
        const auto* found = value.is_array ? nullptr : std::get_if<double>(&value.scalar);
        if (!found) refuse(key, "must be a float, but is " + describe(value));
        if (!(*found >= low && *found <= high)) {
            refuse(key, format("is %g; it must be %g to %g", *found, low, high));
        }
        return static_cast<float>(*found);
    }

    float number_or(const std::string& key, float fallback, double low, double high) const {
        return has(key) ? number(key, low, high) : fallback;
    }

    const Value& require(const std::string& key) const {
        const Value* value = file_.find(key);
        if (!value)
            throw Error(ErrorKind::format, file_.path() + ": required key " + quoted(key) + " is missing");
        return *value;
    }

  private:
    static std::string describe(const Value& value) {
        return value.is_array ? format("%s of %zu", value.type_name().c_str(), value.array_length())
                              : value.type_name();
    }

    void check_range(const std::string& key, int64_t value, int64_t low, int64_t high) const {
        if (value < low || value > high) {
            refuse(key, format("is %lld; it must be %lld to %lld", static_cast<long long>(value),
                               static_cast<long long>(low), static_cast<long long>(high)));
        }
    }

    const GgufFile& file_;
};

void check_architecture(const GgufFile& file, const KeyReader& keys) {
    const Value& value = keys.require("general.architecture");
    const auto* name = value.is_array ? nullptr : std::get_if<std::string>(&value.scalar);
    if (!name) keys.refuse("general.architecture", "must be a string");
    if (*name != kArchitecture) {
        throw Error(ErrorKind::unsupported, file.path() + ": architecture " + quoted(*name) +
                                                " is not supported; only '" + kArchitecture + "' is");
    }
    const Value* n_parts = file.find("split.count");
    if (n_parts && keys.integer("split.count", 0, 65535) > 1) {
        throw Error(
            ErrorKind::unsupported,
            file.path() + ": is a single part of a split model (key 'split.count'): open its first part");
    }
    // Features of related models that are not implemented: ignoring them would give wrong results.
    for (const char* key : {"attention.shared_kv_layers", "embedding_length_per_layer_input"}) {
        const std::string name_of_key = KeyReader::arch_key(key);
        if (!file.find(name_of_key)) continue;
        for (const int64_t v : keys.integers(name_of_key)) {
            if (v != 0) keys.unsupported(name_of_key, "is not 0: not supported");
        }
    }
    if (file.find(KeyReader::arch_key("rope.scaling.type"))) {
        const Value& scaling = keys.require(KeyReader::arch_key("rope.scaling.type"));
        const auto* kind = scaling.is_array ? nullptr : std::get_if<std::string>(&scaling.scalar);
        if (!kind || *kind != "none")
            keys.unsupported(KeyReader::arch_key("rope.scaling.type"), "is not 'none': not supported");
    }
}

// One bool per layer, true = sliding; or a period n whose last layer is full.
std::vector<bool> read_pattern(const KeyReader& keys, int32_t n_layer) {
    const std::string key = KeyReader::arch_key("attention.sliding_window_pattern");
    std::vector<bool> sliding;
    if (keys.require(key).is_array) {
        for (const int32_t flag : keys.per_layer(key, n_layer, 0, 1)) sliding.push_back(flag == 1);
    } else {
        const int32_t period = keys.integer(key, 1, n_layer);
        for (int32_t i = 0; i < n_layer; ++i) sliding.push_back((i + 1) % period != 0);
    }
    return sliding;
}

int32_t read_head_dim(const KeyReader& keys, const std::string& suffix) {
    const std::string key = KeyReader::arch_key("attention.key_length" + suffix);
    const int32_t head_dim = keys.integer(key, 2, 1024);
    if (head_dim % 2) keys.refuse(key, format("is %d; it must be even", head_dim));
    const std::string value_key = KeyReader::arch_key("attention.value_length" + suffix);
    if (keys.integer_or(value_key, head_dim, 1, 1024) != head_dim) {
        keys.unsupported(value_key, "differs from the key length: not supported");
    }
    const std::string rope_key = KeyReader::arch_key("rope.dimension_count" + suffix);
    if (keys.integer_or(rope_key, head_dim, 1, 1024) != head_dim) {
        keys.unsupported(rope_key, "differs from the head dimension: not supported");
    }
    return head_dim;
}

SamplerValues read_sampler(const KeyReader& keys, const SamplerTable& table) {
    SamplerValues values = table.reference_defaults();
    for (const SamplerOption& option : table.options) {
        if (!keys.has(option.key)) continue;
        if (option.integer)
            values[option.name] =
                keys.integer(option.key, static_cast<int64_t>(option.low), static_cast<int64_t>(option.high));
        else
            values[option.name] = keys.number(option.key, option.low, option.high);
    }
    if (const auto conflict = table.conflict(values))
        keys.refuse(table.option(conflict->name).key, conflict->what);
    return values;
}

}  // namespace

Hparams::Hparams(const GgufFile& file) {
    const KeyReader keys(file);
    check_architecture(file, keys);
    const auto arch_key = [](const char* key) { return KeyReader::arch_key(key); };

    n_layer = keys.integer(arch_key("block_count"), 1, 1024);
    n_ctx_train = keys.integer(arch_key("context_length"), 1, INT32_MAX / 2);
    n_embd = keys.integer(arch_key("embedding_length"), 1, 1 << 17);
    n_ff = keys.integer(arch_key("feed_forward_length"), 1, 1 << 20);
    n_ff_expert = keys.integer(arch_key("expert_feed_forward_length"), 1, 1 << 20);
    n_expert = keys.integer(arch_key("expert_count"), 1, 4096);
    n_expert_used = keys.integer(arch_key("expert_used_count"), 1, n_expert);
    n_head = keys.integer(arch_key("attention.head_count"), 1, 1024);
    window = keys.integer(arch_key("attention.sliding_window"), 1, 1 << 24);
    canvas_length = keys.integer(kCanvasLengthKey, 1, 1 << 16);
    rms_eps = keys.number(arch_key("attention.layer_norm_rms_epsilon"), 1e-12, 0.1);
    soft_cap = keys.number(arch_key("final_logit_softcapping"), 1e-3, 1e6);
    rope_base = keys.number(arch_key("rope.freq_base"), 1.0, 1e12);
    rope_base_swa = keys.number_or(arch_key("rope.freq_base_swa"), 10000.0f, 1.0, 1e12);
    if (canvas_length > n_ctx_train) {
        keys.refuse(kCanvasLengthKey,
                    format("is %d, larger than the context length %d", canvas_length, n_ctx_train));
    }

    const std::vector<bool> sliding = read_pattern(keys, n_layer);
    const std::vector<int32_t> n_head_kv =
        keys.per_layer(arch_key("attention.head_count_kv"), n_layer, 1, n_head);
    const bool any_sliding = std::find(sliding.begin(), sliding.end(), true) != sliding.end();
    const bool any_full = std::find(sliding.begin(), sliding.end(), false) != sliding.end();
    const int32_t head_dim = any_full ? read_head_dim(keys, "") : 0;
    const int32_t head_dim_swa = any_sliding ? read_head_dim(keys, "_swa") : 0;
    for (int32_t i = 0; i < n_layer; ++i) {
        if (n_head % n_head_kv[i] != 0) {
            keys.refuse(arch_key("attention.head_count_kv"),
                        format("is %d in layer %d, which does not divide the number of heads %d",
                               n_head_kv[i], i, n_head));
        }
        layers.push_back({sliding[i], sliding[i] ? head_dim_swa : head_dim, n_head_kv[i]});
    }
    sampler = read_sampler(keys, entropy_bound_table());

    // The embedding defines n_vocab; the tokenizer's list must have as many entries.
    const TensorInfo* embedding = file.find_tensor("token_embd.weight");
    if (!embedding) throw Error(ErrorKind::format, file.path() + ": tensor 'token_embd.weight' is missing");
    const int64_t vocabulary = embedding->dimension(1);
    if (embedding->ne.size() != 2 || vocabulary < 2 || vocabulary > 1 << 24) {
        throw Error(ErrorKind::format,
                    file.path() + ": tensor 'token_embd.weight' has the invalid shape " + embedding->shape());
    }
    n_vocab = static_cast<int32_t>(vocabulary);
    if (const Value* tokens = file.find("tokenizer.ggml.tokens")) {
        if (!tokens->is_array || tokens->strings.size() != static_cast<size_t>(n_vocab)) {
            keys.refuse("tokenizer.ggml.tokens", format("has %zu entries, but token_embd.weight has %d rows",
                                                        tokens->array_length(), n_vocab));
        }
    }
}

}  // namespace pydiffusion
