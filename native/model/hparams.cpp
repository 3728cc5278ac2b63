#include "model/hparams.h"

#include <algorithm>

#include "model/architecture.h"
#include "model/key_reader.h"
#include "sampler/registry.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

std::string quoted_list(const std::vector<std::string>& names) {
    std::string list;
    for (size_t i = 0; i < names.size(); ++i)
        list += (i == 0 ? "" : i + 1 == names.size() ? " and " : ", ") + quoted(names[i]);
    return list;
}

const Architecture& architecture_of(const GgufFile& file) {
    const std::string other = file.other_kind();
    if (!other.empty()) throw Error(ErrorKind::unsupported, file.path() + ": is " + other);
    const std::string name = KeyReader(file, "").text("general.architecture");
    if (const Architecture* found = find_architecture(name)) return *found;
    const std::vector<std::string> known = architecture_names();
    throw Error(ErrorKind::unsupported, file.path() + ": architecture " + quoted(name) +
                                            " is not supported; only " + quoted_list(known) +
                                            (known.size() == 1 ? " is" : " are"));
}

void refuse_single_part(const GgufFile& file, const KeyReader& keys) {
    if (!file.find("split.count") || keys.integer("split.count", 0, 65535) <= 1) return;
    throw Error(ErrorKind::unsupported,
                file.path() + ": is a single part of a split model (key 'split.count'): open its first part");
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
    const auto conflict = table.conflict ? table.conflict(values) : std::nullopt;
    if (conflict) keys.refuse(table.option(conflict->name).key, conflict->what);
    return values;
}

// The embedding defines the vocabulary; the tokenizer's list must have as many entries.
int32_t read_n_vocab(const GgufFile& file, const KeyReader& keys) {
    const TensorInfo* embedding = file.find_tensor("token_embd.weight");
    if (!embedding) throw Error(ErrorKind::format, file.path() + ": tensor 'token_embd.weight' is missing");
    const int64_t n_vocab = embedding->dimension(1);
    if (embedding->ne.size() != 2 || n_vocab < 2 || n_vocab > 1 << 24) {
        throw Error(ErrorKind::format,
                    file.path() + ": tensor 'token_embd.weight' has the invalid shape " + embedding->shape());
    }
    if (const Value* tokens = file.find("tokenizer.ggml.tokens")) {
        if (!tokens->is_array || tokens->strings.size() != static_cast<size_t>(n_vocab)) {
            keys.refuse("tokenizer.ggml.tokens",
                        format("has %zu entries, but token_embd.weight has %lld rows", tokens->array_length(),
                               static_cast<long long>(n_vocab)));
        }
    }
    return static_cast<int32_t>(n_vocab);
}

// The file's ids; those that it has no keys for, by the tokens' names. None unless all are known.
ImageTokens read_image_tokens(const GgufFile& file, const KeyReader& keys, int32_t n_vocab) {
    const Value* vocabulary = file.find("tokenizer.ggml.tokens");
    bool any_key = false;
    const auto id_of = [&](const char* name, const char* token) {
        const std::string key = keys.own(name);
        if (keys.has(key)) {
            any_key = true;
            return keys.integer(key, 0, n_vocab - 1);
        }
        if (!vocabulary) return -1;
        const std::vector<std::string>& tokens = vocabulary->strings;
        const auto found = std::find(tokens.begin(), tokens.end(), token);
        return found == tokens.end() ? -1 : static_cast<int32_t>(found - tokens.begin());
    };
    const ImageTokens ids = {id_of("image_token_id", "<|image|>"), id_of("image_begin_token_id", "<|image>"),
                             id_of("image_end_token_id", "<image|>")};
    if (ids.image >= 0 && ids.begin >= 0 && ids.end >= 0) return ids;
    if (any_key)
        keys.refuse(keys.own("image_token_id"),
                    "or a key beside it is missing: image, begin and end token come together");
    return {};
}

bool read_bidirectional_images(const KeyReader& keys) {
    const std::string key = keys.own("attention.bidirectional");
    const std::string kind = keys.has(key) ? keys.text(key) : "vision";
    if (kind != "vision" && kind != "none")
        keys.unsupported(key, "is " + quoted(kind) + "; supported are 'vision' and 'none'");
    return kind == "vision";
}

}  // namespace

Hparams::Hparams(const GgufFile& file) : architecture(&architecture_of(file)) {
    const KeyReader keys(file, architecture->name());
    refuse_single_part(file, keys);
    architecture->read_hparams(keys, *this);
    canvas_length = keys.integer(kCanvasLengthKey, 1, 1 << 16);
    if (canvas_length > n_ctx_train) {
        keys.refuse(kCanvasLengthKey,
                    format("is %d, larger than the context length %d", canvas_length, n_ctx_train));
    }
    sampler = read_sampler(keys, sampler_table(architecture->sampler()));
    n_vocab = read_n_vocab(file, keys);
    image_tokens = read_image_tokens(file, keys, n_vocab);
    bidirectional_images = read_bidirectional_images(keys);
    if (mask_token >= n_vocab)
        keys.refuse(kMaskTokenKey, format("is %d, outside the vocabulary, 0 to %d", mask_token, n_vocab - 1));
}

}  // namespace pydiffusion
