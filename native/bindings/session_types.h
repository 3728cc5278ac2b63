// Types shared by the bindings of models, sessions and batches.
#pragma once

#include <memory>

#include "runtime/session.h"

namespace pydiffusion {

// _native.Model: the model and the KV cache type of its sessions.
struct PyModel {
    std::shared_ptr<const Model> model;
    ggml_type kv_type;
};

// _native.Adapter. Sessions own what it points to, not the Python object: they let go of it without the GIL.
struct PyAdapter {
    std::shared_ptr<const Adapter> adapter;
};

}  // namespace pydiffusion
