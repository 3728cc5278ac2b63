// Error injection: makes the k-th graph of a conversation fail, for every k, before or after computing it.
// Each failure must be a typed error, after which the same session must give the same output as an
// undisturbed one.
//   build/fuzz/inject_errors MODEL.gguf
#include <cstdio>
#include <cstdlib>

#include "default_params.h"
#include "runtime/step.h"
#include "util/error.h"

namespace {

int n_until_failure = -1;  // graphs; negative: never
bool fails_afterwards = false;
ggml_status failure = GGML_STATUS_FAILED;

void require(bool ok, const char* what) {
    if (ok) return;
    std::fprintf(stderr, "FAILED: %s\n", what);
    std::exit(1);
}

}  // namespace

// The linker redirects calls of ggml_graph_compute to __wrap_ (--wrap).
extern "C" ggml_status __real_ggml_graph_compute(ggml_cgraph* graph, ggml_cplan* plan);
extern "C" ggml_status __wrap_ggml_graph_compute(ggml_cgraph* graph, ggml_cplan* plan) {
    const bool fails = n_until_failure >= 0 && n_until_failure-- == 0;
    if (fails && !fails_afterwards) return failure;
    const ggml_status status = __real_ggml_graph_compute(graph, plan);
    return fails ? failure : status;
}

namespace {

const std::vector<int32_t> kPrompt = {2, 5, 9, 40, 41, 42, 43};

std::vector<int32_t> run_conversation(pydiffusion::Session& session) {
    const auto ignore = [](int32_t) {};
    {
        const pydiffusion::Session::Use use(session);  // as in the bindings: an error ends the generation
        session.truncate(0, ignore);
        session.encode({kPrompt}, ignore, {});
        pydiffusion::GenerationParams params = default_params(session.model().hparams);
        params.max_tokens = 3 * session.model().hparams.canvas_length;
        params.sampler.values["steps"] = 4;
        params.sampler.values["confidence_threshold"] = 0;
        session.begin(params);
    }
    std::vector<int32_t> output;
    while (const auto step = pydiffusion::next_step(session, ignore))
        output.insert(output.end(), step->tokens.begin(), step->tokens.end());
    return output;
}

}  // namespace

int main(int argc, char** argv) {
    require(argc == 2, "usage: inject_errors MODEL.gguf");
    const auto file = std::make_shared<pydiffusion::GgufFile>(argv[1]);
    const auto model = std::make_shared<pydiffusion::Model>(file, 1, "cpu", "auto", pydiffusion::DevicePlan(),
                                                            [](double) {});
    pydiffusion::Session fresh(model, 64, GGML_TYPE_F32), session(model, 64, GGML_TYPE_F32);
    const std::vector<int32_t> expected = run_conversation(fresh);
    require(!expected.empty(), "no output tokens");
    int n_failed = 0;
    for (const ggml_status status : {GGML_STATUS_FAILED, GGML_STATUS_ALLOC_FAILED}) {
        for (const bool afterwards : {false, true}) {
            for (int k = 0;; ++k) {
                n_until_failure = k;
                fails_afterwards = afterwards;
                failure = status;
                try {
                    run_conversation(session);
                    n_until_failure = -1;
                    break;  // fewer than k + 1 graphs
                } catch (const pydiffusion::Error& error) {
                    const bool memory = error.kind() == pydiffusion::ErrorKind::out_of_memory;
                    require(memory == (status == GGML_STATUS_ALLOC_FAILED), error.what());
                    ++n_failed;
                }
                require(!pydiffusion::next_step(session, [](int32_t) {}),
                        "the generation continues after an error");
                require(run_conversation(session) == expected, "different output after an error");
            }
        }
    }
    require(n_failed >= 4 * 14, "fewer graphs than expected");
    std::printf("%d errors injected\n", n_failed);
}
