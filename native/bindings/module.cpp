#include "bindings/bindings.h"
#include "util/error.h"

NB_MODULE(_native, m) {
    m.doc() =
        "The native runtime: GGUF files, models, sessions, sampler, quantization. Private; use pydiffusion.";
    pydiffusion::install_ggml_handlers();
    pydiffusion::register_exit_handler();
    pydiffusion::bind_errors(m);
    pydiffusion::bind_file(m);
    pydiffusion::bind_model(m);
    pydiffusion::bind_adapters(m);
    pydiffusion::bind_session(m);
    pydiffusion::bind_batch(m);
    pydiffusion::bind_quantize(m);
    pydiffusion::bind_sampler(m);
    pydiffusion::bind_bench(m);
    pydiffusion::bind_vision(m);
    pydiffusion::bind_testing(m);
}
