// Sampler: the noise that a canvas begins with, which positions a denoising step accepts, and when to stop.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "sampler/step_state.h"

namespace pydiffusion {

// Options of a generation that are the sampler's business; each sampler ignores those that it has no use for.
struct SamplerParams {
    int32_t steps = 0;  // for the defaults see the sampler's table
    float t_min = 0.0f;
    float t_max = 0.0f;
    float entropy_bound = 0.0f;
    int32_t stability_threshold = 0;
    float confidence_threshold = 0.0f;
    uint64_t seed = 0;
};

// The rule of one generation, canvas by canvas. The session keeps the canvas and the settled positions: those
// whose token no longer changes, because the caller holds it or because of keeps_tokens().
class Sampler {
  public:
    virtual ~Sampler() = default;

    virtual void begin_canvas(int32_t canvas_index) = 0;
    // Writes the step's temperatures and uniforms. Steps count down to 1.
    virtual void begin_step(int32_t step, StepState& state) = 0;
    // Token of a position without one: at the start of a canvas, and after a step that did not accept it.
    virtual int32_t noise(size_t position) const = 0;
    // 1 for each position that gets a token in this step. A position is settled if its entry is not -1; its
    // entropy is 0, and it must be accepted.
    virtual std::vector<uint8_t> accept(const std::vector<float>& entropy,
                                        const std::vector<int32_t>& settled) const = 0;
    // The token that an accepted position gets.
    virtual int32_t choose(const Measure& measure) const = 0;
    // Whether accepted positions, and those that the caller gave a token for, are settled until the canvas
    // ends.
    virtual bool keeps_tokens() const = 0;
    // Whether the canvas is finished, asked once after each step. The draft may be shorter than the last one:
    // positions at the end that are no longer denoised. mean_entropy: of the whole canvas.
    virtual bool is_done(const std::vector<int32_t>& draft, const std::vector<uint8_t>& accepted,
                         double mean_entropy) = 0;
};

}  // namespace pydiffusion
