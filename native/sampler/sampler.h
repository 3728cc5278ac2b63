// Sampler: the noise that a canvas begins with, which positions a denoising step accepts, and when to stop.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "sampler/sampler_options.h"
#include "sampler/step_state.h"

namespace pydiffusion {

// Options and seed of a generation, for its sampler.
struct SamplerParams {
    SamplerValues values;  // of every option in the sampler's table, "steps" among them
    uint64_t seed = 0;

    float number(const char* name) const { return static_cast<float>(values.at(name)); }
    int32_t count(const char* name) const { return static_cast<int32_t>(values.at(name)); }
    int32_t steps() const { return count("steps"); }
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
