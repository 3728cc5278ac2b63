// What the bindings of sessions and of batches share.
#pragma once

#include <memory>

#include "runtime/session.h"

namespace pydiffusion {

// What Python holds: the model and the cache type that its sessions get.
struct PyModel {
    std::shared_ptr<const Model> model;
    ggml_type kv_type;
};

}  // namespace pydiffusion
