// Fuzz target: load, prompt and generate with nearly valid model headers and a data section of small values
// (two canvases of two steps). Expects a typed error or valid tokens.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "default_params.h"
#include "file_check.h"
#include "gguf_mutator.h"
#include "memory_file.h"
#include "runtime/step.h"
#include "util/error.h"

namespace {

constexpr size_t kDataBytes = size_t{1} << 20;
// Limits on keys that no tensor's shape bounds: larger values are valid but slow.
constexpr int32_t kMaxCanvas = 32, kMaxSteps = 1000;

// Floats between -0.06 and 0.06, whose bytes also serve as blocks of quantized types.
const std::vector<uint8_t>& weights() {
    static const std::vector<uint8_t> bytes = [] {
        std::vector<uint8_t> out(kDataBytes);
        uint32_t state = 1;
        for (size_t i = 0; i < out.size(); i += sizeof(float)) {
            state = state * 1664525u + 1013904223u;
            const float value = (static_cast<float>(state >> 8) / 16777216.0f - 0.5f) * 0.12f;
            std::memcpy(&out[i], &value, sizeof value);
        }
        return out;
    }();
    return bytes;
}

void check_tokens(const std::vector<int32_t>& tokens, int32_t n_vocab) {
    for (const int32_t token : tokens) require(token >= 0 && token < n_vocab);
}

// Counts how far inputs get, printed at exit: a target that refuses all of them tests nothing.
struct Count {
    size_t n_inputs = 0, n_opened = 0, n_done = 0;
    ~Count() { std::fprintf(stderr, "%zu inputs: %zu loaded, %zu denoised\n", n_inputs, n_opened, n_done); }
} count;

// Returns whether the generation ran to its end.
bool generate(const std::shared_ptr<const pydiffusion::Model>& model) {
    const pydiffusion::Hparams& hp = model->hparams;
    ++count.n_opened;
    if (hp.canvas_length > kMaxCanvas || hp.sampler.at("steps") > kMaxSteps) return false;
    const int32_t n_ctx = std::min(hp.n_ctx_train, 3 * hp.canvas_length + 8);
    pydiffusion::Session session(model, n_ctx, GGML_TYPE_F16);
    session.encode({{hp.n_vocab - 1, 0, hp.n_vocab / 2}}, [](int32_t) {}, {});
    pydiffusion::GenerationParams params = default_params(hp);
    params.max_tokens = 2 * hp.canvas_length;
    params.sampler.values["steps"] = 2;
    session.begin(params);
    while (const auto step = pydiffusion::next_step(session, [](int32_t) {})) {
        check_tokens(step->draft, hp.n_vocab);
        check_tokens(step->canvas, hp.n_vocab);
        for (const float entropy : step->entropy) require(std::isfinite(entropy));
    }
    require(session.n_past() <= n_ctx);
    ++count.n_done;
    return true;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    ++count.n_inputs;
    try {
        const auto file = pydiffusion::GgufFile::open_all_parts(memory_file(data, size, weights()));
        const bool done = generate(std::make_shared<pydiffusion::Model>(
            file, 1, "cpu", "auto", pydiffusion::DevicePlan(), [](double) {}));
        if (done) remember_good(data, size);
    } catch (const pydiffusion::Error& error) {
        require(std::string(error.what()).find('\n') == std::string::npos);
    }
    return 0;
}
