// The registry of architectures: one line each.
#include "architectures/diffusion_gemma.h"
#include "model/architecture.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

std::vector<const Architecture*>& architectures() {
    static const DiffusionGemma diffusion_gemma;
    static std::vector<const Architecture*> all = {
        &diffusion_gemma,
    };
    return all;
}

}  // namespace

const Architecture* find_architecture(const std::string& name) {
    for (const Architecture* architecture : architectures()) {
        if (name == architecture->name()) return architecture;
    }
    return nullptr;
}

std::vector<std::string> architecture_names() {
    std::vector<std::string> names;
    for (const Architecture* architecture : architectures()) names.emplace_back(architecture->name());
    return names;
}

void register_architecture(const Architecture& architecture) {
    if (find_architecture(architecture.name()))
        throw Error(ErrorKind::argument,
                    "an architecture " + quoted(architecture.name()) + " is registered already");
    architectures().push_back(&architecture);
}

}  // namespace pydiffusion
