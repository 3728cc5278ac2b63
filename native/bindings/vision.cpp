// Bindings of vision towers.
#include <nanobind/stl/string.h>

#include "bindings/bindings.h"
#include "bindings/session_types.h"
#include "util/error.h"
#include "vision/vision_memory.h"
#include "vision/vision_tower.h"

namespace pydiffusion {

namespace {

// _native.Vision
struct PyVision {
    std::shared_ptr<const VisionTower> tower;
};

PyVision load_vision(const std::string& path, const PyModel& model) {
    const WithoutGil release;
    return {std::make_shared<VisionTower>(path, model.model, [](double) { check_signals(); })};
}

Numpy2<float> encode_patches(const PyVision& vision, const Array2<float>& patches,
                             const Array2<int32_t>& positions) {
    const VisionHparams& hp = vision.tower->hparams;
    const size_t n = patches.shape(0);
    if (patches.shape(1) != static_cast<size_t>(hp.patch_elements()))
        throw Error(
            ErrorKind::argument,
            format("patches have %zu values; those of this tower have %lld (3 * %d * %d)", patches.shape(1),
                   static_cast<long long>(hp.patch_elements()), hp.patch_size, hp.patch_size));
    if (positions.shape(0) != n || positions.shape(1) != 2)
        throw Error(ErrorKind::argument, format("positions have shape (%zu, %zu), expected (%zu, 2)",
                                                positions.shape(0), positions.shape(1), n));
    std::vector<AxialPosition> places(n);
    for (size_t i = 0; i < n; ++i) places[i] = {positions.data()[2 * i], positions.data()[2 * i + 1]};
    std::vector<float> features;
    {
        const WithoutGil release;
        features = vision.tower->encode(patches.data(), places, check_signals);
    }
    const size_t width = hp.projection_dim, n_rows = features.size() / width;
    return to_numpy(std::move(features), n_rows, width);
}

nb::dict info(const PyVision& vision) {
    const VisionHparams& hp = vision.tower->hparams;
    const VisionWeights& weights = vision.tower->weights;
    nb::dict d;
    d["name"] = to_str(hp.name);
    d["patch_size"] = hp.patch_size;
    d["pooling"] = hp.pooling;
    d["n_positions"] = hp.n_positions;
    d["max_soft_tokens"] = hp.max_soft_tokens;
    d["projection_dim"] = hp.projection_dim;
    d["n_layer"] = hp.n_layer;
    d["n_embd"] = hp.n_embd;
    d["n_ff"] = hp.n_ff;
    d["n_head"] = hp.n_head;
    d["head_dim"] = hp.head_dim;
    d["rms_eps"] = hp.rms_eps;
    d["rope_theta"] = hp.rope_theta;
    d["standardize"] = hp.standardize;
    d["clipped"] = hp.clipped;
    d["n_weights"] = weights.n_weights;
    d["n_bytes"] = vision.tower->file->n_bytes_of_all_parts();
    d["weight_types"] = weight_types(weights);
    d["work_bytes"] = vision_memory(*vision.tower->file, hp, ggml_backend_cpu_buffer_type()).work;
    d["kernels"] = vision.tower->kernel_name();
    return d;
}

}  // namespace

void bind_vision(nb::module_& m) {
    nb::class_<PyVision>(
        m, "Vision",
        "Vision tower and projector of a mmproj file, for a model; immutable, shared by threads.")
        .def(
            "__init__",
            [](PyVision* self, const nb::str& path, const PyModel& model) {
                new (self) PyVision(load_vision(from_str(path), model));
            },
            nb::arg("path"), nb::arg("model"))
        .def(
            "encode", encode_patches, nb::arg("patches"), nb::arg("positions"),
            "Features of an image's soft tokens: float32 (n // pooling**2, projection_dim). patches: float32 "
            "(n, 3 * patch_size**2), pixels from 0 to 1 with their channels side by side; positions: int32 "
            "(n, 2), column and row of each patch, together a full grid.")
        .def_prop_ro("info", info);
}

}  // namespace pydiffusion
