// A generation's parameters with the sampler options of a model's file.
#pragma once

#include "runtime/session.h"

inline pydiffusion::GenerationParams default_params(const pydiffusion::Hparams& hparams) {
    pydiffusion::GenerationParams params;
    params.sampler.values = hparams.sampler;
    return params;
}
