#include "model/kv_layout.h"

#include "util/error.h"

namespace pydiffusion {

void require_fitting_heads(const Hparams& hp, ggml_type type) {
    const int64_t block = ggml_blck_size(type);
    for (const LayerShape& shape : hp.layers) {
        if (shape.head_dim % block == 0) continue;
        throw Error(ErrorKind::argument,
                    format("a cache of %s needs heads of a multiple of %lld; this model has some of %d: "
                           "choose another kv_type",
                           ggml_type_name(type), static_cast<long long>(block), shape.head_dim));
    }
}

}  // namespace pydiffusion
