// Adds the toy architecture and its sampler to an extension that is built with PYDIFFUSION_TESTING: a line
// for each registry.
#include "sampler/registry.h"
#include "toy/masked_toy.h"
#include "toy/unmask_sampler.h"

namespace pydiffusion {
namespace testing {

namespace {

const bool registered = [] {
    static const MaskedToy toy;
    register_architecture(toy);
    register_sampler(unmask_table(), make_unmask);
    return true;
}();

}  // namespace

}  // namespace testing
}  // namespace pydiffusion
