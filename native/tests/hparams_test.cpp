// Hparams: read from a file's keys, defaults, and what is refused.
#include "model/hparams.h"

#include "architectures/diffusion_gemma.h"
#include "small_model.h"
#include "support.h"

namespace pydiffusion {
namespace testing {

namespace {

Hparams read(const GgufImage& image) {
    const TemporaryFolder folder;
    return Hparams(GgufFile(folder.write("model.gguf", image.bytes())));
}

GgufImage with(const std::string& key, const Bytes& value_with_type) {
    SmallModel model;
    model.left_out = key;
    GgufImage image = model.image();
    image.keys.push_back(Bytes().text(key).append(value_with_type));
    return image;
}

GgufImage with(const std::string& key, uint32_t value) { return with(key, Bytes().u32(U32).u32(value)); }
GgufImage with(const std::string& key, float value) { return with(key, Bytes().u32(F32).f32(value)); }

}  // namespace

TEST_CASE("what the file says") {
    const Hparams hp = read(SmallModel().image());
    CHECK(hp.n_layer == 3);
    CHECK(hp.n_ctx_train == 4096);
    CHECK(hp.n_embd == 32);
    CHECK(hp.n_vocab == 64);
    CHECK(hp.n_ff == 64);
    CHECK(hp.n_ff_expert == 16);
    CHECK(hp.n_expert == 4);
    CHECK(hp.n_expert_used == 2);
    CHECK(hp.n_head == 2);
    CHECK(hp.window == 100);
    CHECK(hp.canvas_length == 16);
    CHECK(hp.rms_eps == 1e-6f);
    CHECK(hp.soft_cap == 30.0f);
    CHECK(hp.rope_base == 1e6f);
    CHECK(hp.rope_base_swa == 10000.0f);  // the default
    REQUIRE(hp.layers.size() == 3);
    CHECK(hp.layers[0].sliding);
    CHECK(hp.layers[0].head_dim == 32);
    CHECK_FALSE(hp.layers[1].sliding);
    CHECK(hp.layers[1].head_dim == 64);
    CHECK(hp.layers[2].n_head_kv == 1);
    CHECK(hp.sampler == entropy_bound_table().reference_defaults());
}

TEST_CASE("a pattern given as a period") {
    const Hparams hp = read(with(own("attention.sliding_window_pattern"), 2u));
    CHECK(hp.layers[0].sliding);
    CHECK_FALSE(hp.layers[1].sliding);
    CHECK(hp.layers[2].sliding);
}

TEST_CASE("the sampler's defaults are the file's") {
    CHECK(read(with("diffusion.eb_max_steps", 7u)).sampler.at("steps") == 7);
    CHECK(read(with("diffusion.eb_entropy_bound", 0.25f)).sampler.at("entropy_bound") == 0.25);
    CHECK_ERROR(read(with("diffusion.eb_t_max", 0.1f)), format, "diffusion.eb_t_max");  // below t_min
}

namespace {

GgufImage with_image_keys(std::vector<std::pair<const char*, uint32_t>> keys) {
    GgufImage image = SmallModel().image();
    for (const auto& [key, value] : keys) image.key(own(key), value);
    return image;
}

GgufImage with_tokens(const std::vector<std::string>& first) {
    Bytes tokens;
    tokens.u32(ARRAY).u32(STRING).u64(64);
    for (size_t i = 0; i < 64; ++i) tokens.text(i < first.size() ? first[i] : format("t%zu", i));
    return with("tokenizer.ggml.tokens", tokens);
}

}  // namespace

TEST_CASE("tokens of images: by their keys, else by their names") {
    CHECK_FALSE(read(SmallModel().image()).image_tokens.any());
    const ImageTokens by_key =
        read(with_image_keys({{"image_token_id", 5}, {"image_begin_token_id", 6}, {"image_end_token_id", 7}}))
            .image_tokens;
    CHECK(by_key.image == 5);
    CHECK(by_key.begin == 6);
    CHECK(by_key.end == 7);
    const ImageTokens by_name = read(with_tokens({"<|image>", "<image|>", "<|image|>"})).image_tokens;
    CHECK(by_name.begin == 0);
    CHECK(by_name.end == 1);
    CHECK(by_name.image == 2);
    CHECK_FALSE(read(with_tokens({"<|image|>", "<|image>"})).image_tokens.any());
    CHECK_ERROR(read(with_image_keys({{"image_token_id", 5}})), format, own("image_token_id"));
    CHECK_ERROR(read(with_image_keys({{"image_token_id", 64}})), format, own("image_token_id"));
}

TEST_CASE("how tokens of an image see each other") {
    const std::string key = own("attention.bidirectional");
    const auto text = [](const char* value) { return Bytes().u32(STRING).text(value); };
    CHECK(read(SmallModel().image()).bidirectional_images);
    CHECK(read(with(key, text("vision"))).bidirectional_images);
    CHECK_FALSE(read(with(key, text("none"))).bidirectional_images);
    CHECK_ERROR(read(with(key, text("all"))), unsupported, key);
    CHECK_ERROR(read(with(key, 1u)), format, key);
}

TEST_CASE("a key that is missing is named") {
    for (const char* key : {"block_count", "embedding_length", "attention.sliding_window",
                            "attention.sliding_window_pattern", "final_logit_softcapping"}) {
        CAPTURE(key);
        SmallModel model;
        model.left_out = own(key);
        CHECK_ERROR(read(model.image()), format, own(key));
    }
}

TEST_CASE("values that are not possible are refused by their key") {
    const auto refused = [](const char* key, const auto& value) {
        CAPTURE(key);
        CHECK_ERROR(read(with(key, value)), format, key);
    };
    refused("diffusion-gemma.block_count", 0u);
    refused("diffusion-gemma.block_count", 1.0f);
    refused("diffusion-gemma.embedding_length", 1u << 20);
    refused("diffusion-gemma.expert_used_count", 5u);        // of 4
    refused("diffusion-gemma.attention.key_length", 63u);    // odd
    refused("diffusion-gemma.attention.head_count_kv", 3u);  // of 2 heads
    refused("diffusion-gemma.final_logit_softcapping", -1.0f);
    refused("diffusion-gemma.attention.sliding_window", 0u);
    refused("diffusion.canvas_length", 5000u);  // the context is 4096
    refused("diffusion-gemma.attention.sliding_window_pattern", Bytes().u32(ARRAY).u32(BOOL).u64(2).zeros(2));
    refused("tokenizer.ggml.tokens", Bytes().u32(ARRAY).u32(STRING).u64(1).text("a"));
}

TEST_CASE("other models are not supported") {
    CHECK_ERROR(read(with("general.architecture", Bytes().u32(STRING).text("llama"))), unsupported,
                "'llama'");
    CHECK_ERROR(read(with("general.architecture", Bytes().u32(STRING).text("clip"))), unsupported, "mmproj");
    CHECK_ERROR(read(with("general.type", Bytes().u32(STRING).text("adapter"))), unsupported, "LoRA adapter");
    CHECK_ERROR(read(with(own("attention.shared_kv_layers"), 1u)), unsupported, "shared_kv_layers");
    CHECK_ERROR(read(with(own("attention.value_length"), 32u)), unsupported, "value_length");
    CHECK_ERROR(read(with("split.count", 2u)), unsupported, "split.count");
}

TEST_CASE("an architecture's name is registered once") {
    static const DiffusionGemma again;
    CHECK_ERROR(register_architecture(again), argument, "'diffusion-gemma' is registered already");
    CHECK(architecture_names() == std::vector<std::string>{"diffusion-gemma"});
    CHECK(find_architecture("diffusion-gemma") != &again);
    CHECK(find_architecture("llama") == nullptr);
}

}  // namespace testing
}  // namespace pydiffusion
