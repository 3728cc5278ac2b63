#include "kv_cache/kv_layout.h"

#include "util/error.h"

namespace pydiffusion {

void require_fitting_heads(const Hparams& hp, ggml_type type) {
    const int64_t block = ggml_blck_size(type);
    for (const LayerShape& shape : hp.layers) {
        if (shape.head_dim % block == 0) continue;
        throw Error(
            ErrorKind::argument,
            format("a KV cache of type %s needs a head_dim that is a multiple of %lld; this model has %d: "
                   "choose another kv_type",
                   ggml_type_name(type), static_cast<long long>(block), shape.head_dim));
    }
}

}  // namespace pydiffusion
