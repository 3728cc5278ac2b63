#include "graph/layer_trace.h"

#include "ggml-backend.h"

namespace pydiffusion {

void LayerTrace::keep(const char* name, int32_t i_layer, ggml_tensor* x) {
    ggml_set_output(x);
    if (x->view_src) ggml_set_output(x->view_src);
    kept_[{i_layer, name}] = x;
}

void LayerTrace::read() {
    for (const auto& [place, x] : kept_) {
        TracedRows& rows = rows_[place];
        rows.width = x->ne[0];
        const size_t row_bytes = x->ne[0] * sizeof(float);
        for (int64_t i = 0; i < x->ne[1]; ++i) {
            rows.values.resize(rows.values.size() + x->ne[0]);
            float* row = rows.values.data() + rows.values.size() - x->ne[0];
            ggml_backend_tensor_get(x, row, i * x->nb[1], row_bytes);  // a view's rows may be apart
        }
    }
}

}  // namespace pydiffusion
