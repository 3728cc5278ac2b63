#include "runtime/encoder.h"

#include <algorithm>

#include "model/architecture.h"
#include "model/limits.h"
#include "sampler/logits.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

// Tokens [begin, end) of a prompt.
struct Chunk {
    const Prompt& prompt;
    int32_t begin, end;

    int32_t n_tokens() const { return end - begin; }
};

// At most kEncodeChunk tokens, but for a longer image, which is a chunk by itself.
Chunk chunk_from(const Prompt& prompt, int32_t begin) {
    const int32_t end = std::min(begin + kEncodeChunk, static_cast<int32_t>(prompt.ids.size()));
    for (const PromptImage& image : prompt.images) {
        if (image.begin < end && end < image.end)
            return {prompt, begin, image.begin > begin ? image.begin : image.end};
    }
    return {prompt, begin, end};
}

std::vector<PromptImage> images_of(const Chunk& chunk) {
    std::vector<PromptImage> images;
    for (const PromptImage& image : chunk.prompt.images) {
        if (image.begin >= chunk.begin && image.end <= chunk.end) images.push_back(image);
    }
    return images;
}

// The first layer's input: rows of embedded tokens and, in the places of images, of features.
class ChunkInput {
  public:
    explicit ChunkInput(const Chunk& chunk) : images_(images_of(chunk)) {
        int32_t at = chunk.begin;
        const auto add_ids = [&](int32_t end) {
            ids_.insert(ids_.end(), chunk.prompt.ids.begin() + at, chunk.prompt.ids.begin() + end);
        };
        for (const PromptImage& image : images_) {
            add_ids(image.begin);
            runs_.push_back({image.begin - at, image.n_tokens()});
            at = image.end;
        }
        add_ids(chunk.end);
        runs_.push_back({chunk.end - at, 0});
    }

    // The images' positions where the chunk's first token is at `first`.
    std::vector<ImageRange> ranges(const Chunk& chunk, int32_t first) const {
        std::vector<ImageRange> ranges;
        for (const PromptImage& image : images_)
            ranges.push_back({first + image.begin - chunk.begin, first + image.end - chunk.begin});
        return ranges;
    }

    ggml_tensor* build(GraphBuilder& g) {
        ggml_tensor* text = nullptr;
        if (!ids_.empty()) {
            tokens_ = g.new_tokens(static_cast<int64_t>(ids_.size()));
            text = g.model.hparams.architecture->embed_prompt(g, tokens_);
        }
        if (images_.empty()) return text;
        features_ = g.new_features(n_features());
        std::vector<ggml_tensor*> parts;
        int64_t first_text = 0, first_features = 0;
        const auto add = [&](ggml_tensor* rows, int64_t& first, int64_t n) {
            if (n > 0)
                parts.push_back(
                    ggml_view_2d(g.ctx(), rows, rows->ne[0], n, rows->nb[1], first * rows->nb[1]));
            first += n;
        };
        for (const Run& run : runs_) {
            add(text, first_text, run.n_text);
            add(features_, first_features, run.n_features);
        }
        return g.ops->concat_tokens(parts);
    }

    // After the graph is allocated.
    void write() const {
        if (tokens_) ggml_backend_tensor_set(tokens_, ids_.data(), 0, ids_.size() * sizeof(int32_t));
        size_t at = 0;
        for (const PromptImage& image : images_) {
            const size_t n_bytes = image.features->size() * sizeof(float);
            ggml_backend_tensor_set(features_, image.features->data(), at, n_bytes);
            at += n_bytes;
        }
    }

  private:
    struct Run {
        int64_t n_text, n_features;
    };
    int64_t n_features() const {
        int64_t n = 0;
        for (const Run& run : runs_) n += run.n_features;
        return n;
    }

    std::vector<PromptImage> images_;
    std::vector<int32_t> ids_;  // of the text
    std::vector<Run> runs_;
    ggml_tensor *tokens_ = nullptr, *features_ = nullptr;  // null if there are none
};

void encode_chunk(const Model& model, KvCache& cache, GraphExecutor& executor, const Chunk& chunk,
                  const std::atomic<bool>& cancel, const EncoderOutputs& outputs, const AdapterList& adapters,
                  ImatrixCollector* imatrix, LayerTrace* trace) {
    const Hparams& hp = model.hparams;
    const int32_t n_tokens = chunk.n_tokens();
    const auto lock = model.backend.lock_devices();
    cache.prepare(n_tokens);
    ChunkInput input(chunk);
    GraphBuilder g(model, Mode::encoder,
                   {{&cache, n_tokens, 0, input.ranges(chunk, cache.n_past()), &adapters}});
    g.trace = trace;
    if (trace) trace->begin_graph();
    if (imatrix) g.ops->keep_activations();

    const Architecture& architecture = *hp.architecture;
    ggml_tensor* x = input.build(g);
    g.keep("input", 0, x);
    for (int32_t i = 0; i + 1 < hp.n_layer; ++i) x = architecture.layer(g, i, x);
    if (!outputs.hidden && !outputs.logits) {
        architecture.store_keys_and_values(g, hp.n_layer - 1, x);
    } else {
        x = architecture.layer(g, hp.n_layer - 1, x);
        x = outputs.hidden
                ? g.ops->rms_norm(x, model.weights.output_norm)
                : g.logits(ggml_view_2d(g.ctx(), x, x->ne[0], 1, x->nb[1], (n_tokens - 1) * x->nb[1]));
        ggml_set_output(x);
        ggml_build_forward_expand(g.graph, x);
    }
    if (imatrix) imatrix->keep_inputs(g.graph);
    g.allocate(executor, "encoding a chunk of the prompt");

    model.file->require_not_truncated();
    input.write();
    std::vector<int32_t> positions(n_tokens);
    for (int32_t i = 0; i < n_tokens; ++i) positions[i] = cache.n_past() + i;
    g.set_positions(positions);
    executor.compute(g.graph, [&] { return cancel.load(); });
    if (imatrix) imatrix->add(g.graph);
    if (trace) trace->read();
    cache.advance(n_tokens);
    if (outputs.hidden) {
        ggml_backend_tensor_get(x, outputs.hidden, 0, ggml_nbytes(x));
    } else if (outputs.logits) {
        ggml_backend_tensor_get(x, outputs.logits, 0, ggml_nbytes(x));
        cap_and_measure_row(outputs.logits, hp.n_vocab, hp.soft_cap, 1.0f, 0.0f);
    }
}

}  // namespace

void encode(const Model& model, KvCache& cache, GraphExecutor& executor, const Prompt& prompt,
            const std::atomic<bool>& cancel, const std::function<void(int32_t)>& on_chunk,
            const EncoderOutputs& outputs, const AdapterList& adapters, ImatrixCollector* imatrix,
            LayerTrace* trace) {
    const int32_t n = static_cast<int32_t>(prompt.ids.size());
    for (int32_t done = 0; done < n;) {
        const Chunk chunk = chunk_from(prompt, done);
        EncoderOutputs its;
        if (outputs.hidden) its.hidden = outputs.hidden + int64_t{done} * model.hparams.n_embd;
        if (chunk.end == n) its.logits = outputs.logits;
        encode_chunk(model, cache, executor, chunk, cancel, its, adapters, imatrix, trace);
        done = chunk.end;
        on_chunk(done);
    }
}

}  // namespace pydiffusion
