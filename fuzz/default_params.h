// A generation's parameters with the sampler options of a model's file.
#pragma once

#include "runtime/session.h"
#include "sampler/registry.h"

inline pydiffusion::GenerationParams default_params(const pydiffusion::Hparams& hparams) {
    pydiffusion::GenerationParams params;
    params.sampler = pydiffusion::params_of(hparams.sampler);
    return params;
}
