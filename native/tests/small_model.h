// The smallest file that Hparams accepts, for tests to change.
#pragma once

#include <string>
#include <vector>

#include "gguf_image.h"

namespace pydiffusion {
namespace testing {

inline std::string own(const char* key) { return std::string("diffusion-gemma.") + key; }

struct SmallModel {
    uint32_t n_embd = 32, n_vocab = 64, n_head = 2, window = 100, canvas_length = 16;
    uint32_t head_dim = 64, head_dim_swa = 32;        // of full and of sliding layers
    std::vector<bool> sliding = {true, false, true};  // by layer
    std::string left_out;                             // a key

    GgufImage image() const {
        GgufImage image;
        const auto add = [&](const std::string& key, const auto& value) {
            if (key != left_out) image.key(key, value);
        };
        const auto n_layer = static_cast<uint32_t>(sliding.size());
        add("general.architecture", std::string("diffusion-gemma"));
        add(own("block_count"), n_layer);
        add(own("context_length"), 4096u);
        add(own("embedding_length"), n_embd);
        add(own("feed_forward_length"), 64u);
        add(own("expert_feed_forward_length"), 16u);
        add(own("expert_count"), 4u);
        add(own("expert_used_count"), 2u);
        add(own("attention.head_count"), n_head);
        add(own("attention.head_count_kv"), 1u);
        add(own("attention.sliding_window"), window);
        add(own("attention.key_length"), head_dim);
        add(own("attention.key_length_swa"), head_dim_swa);
        add(own("attention.layer_norm_rms_epsilon"), 1e-6f);
        add(own("final_logit_softcapping"), 30.0f);
        add(own("rope.freq_base"), 1e6f);
        add("diffusion.canvas_length", canvas_length);
        Bytes flags;
        for (const bool flag : sliding) flags.u8(flag);
        if (own("attention.sliding_window_pattern") != left_out)
            image.array(own("attention.sliding_window_pattern"), BOOL, n_layer, flags);
        image.tensor_at_end("token_embd.weight", {n_embd, n_vocab}, 0, 4 * n_embd * n_vocab);
        return image;
    }
};

}  // namespace testing
}  // namespace pydiffusion
