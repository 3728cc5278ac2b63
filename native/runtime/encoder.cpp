#include "runtime/encoder.h"

#include <algorithm>

#include "model/architecture.h"
#include "model/limits.h"
#include "sampler/logits.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

void encode_chunk(const Model& model, KvCache& cache, GraphExecutor& executor, const int32_t* ids,
                  int32_t n_tokens, const std::atomic<bool>& cancel, const EncoderOutputs& outputs,
                  ImatrixCollector* imatrix, LayerTrace* trace) {
    const Hparams& hp = model.hparams;
    const auto lock = model.backend.lock_devices();
    cache.prepare(n_tokens);
    GraphBuilder g(model, Mode::encoder, {{&cache, n_tokens}});
    g.trace = trace;
    if (trace) trace->begin_graph();
    ggml_tensor* tokens = g.new_tokens();
    if (imatrix) g.ops->keep_activations();

    const Architecture& architecture = *hp.architecture;
    ggml_tensor* x = architecture.embed_prompt(g, tokens);
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
    if (imatrix) ImatrixCollector::keep_inputs(g.graph);
    g.allocate(executor, "encoding a chunk of the prompt");

    model.file->require_not_truncated();
    ggml_backend_tensor_set(tokens, ids, 0, n_tokens * sizeof(int32_t));
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

void encode(const Model& model, KvCache& cache, GraphExecutor& executor, const std::vector<int32_t>& ids,
            const std::atomic<bool>& cancel, const std::function<void(int32_t)>& on_chunk,
            const EncoderOutputs& outputs, ImatrixCollector* imatrix, LayerTrace* trace) {
    const int32_t n = static_cast<int32_t>(ids.size());
    for (int32_t done = 0; done < n;) {
        const int32_t n_tokens = std::min(kEncodeChunk, n - done);
        EncoderOutputs its;
        if (outputs.hidden) its.hidden = outputs.hidden + int64_t{done} * model.hparams.n_embd;
        if (done + n_tokens == n) its.logits = outputs.logits;
        encode_chunk(model, cache, executor, ids.data() + done, n_tokens, cancel, its, imatrix, trace);
        done += n_tokens;
        on_chunk(done);
    }
}

}  // namespace pydiffusion
