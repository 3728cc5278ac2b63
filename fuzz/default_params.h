// A generation's parameters with the sampler options of a model's file.
#pragma once

#include "runtime/session.h"

inline pydiffusion::GenerationParams default_params(const pydiffusion::Hparams& hparams) {
    const auto number = [&](const char* name) { return static_cast<float>(hparams.sampler.at(name)); };
    const auto count = [&](const char* name) { return static_cast<int32_t>(hparams.sampler.at(name)); };
    pydiffusion::GenerationParams params;
    params.steps = count("steps");
    params.t_min = number("t_min");
    params.t_max = number("t_max");
    params.entropy_bound = number("entropy_bound");
    params.stability_threshold = count("stability_threshold");
    params.confidence_threshold = number("confidence_threshold");
    return params;
}
