// Bindings of models: device plans, loading, description.
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <limits>
#include <sstream>

#include "backend/devices.h"
#include "bindings/bindings.h"
#include "bindings/session_types.h"
#include "model/architecture.h"
#include "runtime/device_planner.h"
#include "sampler/registry.h"
#include "util/error.h"
#include "vision/vision_memory.h"

namespace pydiffusion {

namespace {

ggml_type cache_type(const GgufFile& file, const std::string& kv_type) {
    if (kv_type == "q8_0") return GGML_TYPE_Q8_0;
    // A file of F32 weights is used for exact results, so keep K and V exact too.
    const bool exact = std::all_of(file.tensors().begin(), file.tensors().end(),
                                   [](const TensorInfo& tensor) { return tensor.type == GGML_TYPE_F32; });
    return kv_type == "f32" || (kv_type == "auto" && exact) ? GGML_TYPE_F32 : GGML_TYPE_F16;
}

constexpr int kMaxSessions = 1 << 16;

// Requested device placement; -1 means automatic.
struct DeviceRequest {
    std::string device = "cpu";
    int32_t n_gpu_layers = -1;
    int32_t n_cpu_moe = -1;
    std::vector<uint64_t> memory_limits;  // per device; 0 or absent: the free memory
    int64_t n_ctx = 0;                    // context to reserve a cache for
    int64_t n_sessions = 1;               // sessions to reserve caches for
    std::string kernels = "auto";
    std::string dense_type = "auto";
    std::string mmproj;  // file of a vision tower to leave room for; "": none
};

struct ResolvedDevices {
    SessionNeeds needs{};              // that the plan has room for
    std::vector<std::string> devices;  // used by the plan; empty: CPU only
    std::vector<DeviceMemory> memory;  // one per device
    DevicePlan device_plan;

    // In Backend's syntax.
    std::string device() const {
        std::string names;
        for (const std::string& name : devices) names += (names.empty() ? "" : ",") + name;
        return names.empty() ? "cpu" : names;
    }
};

// limit: 0 for none.
DeviceMemory device_memory(const std::string& device, uint64_t limit) {
    DeviceMemory memory = {buffer_type_of(device), std::numeric_limits<uint64_t>::max(), 0};
    for (const DeviceInfo& info : list_devices()) {
        if (info.name != device) continue;
        memory.reserved = reserved_bytes(info.free_bytes, info.total_bytes);
        memory.budget = info.free_bytes - memory.reserved;
    }
    memory.fast_bf16 = multiplies_bf16_fast(device);
    if (limit) memory.budget = std::min(memory.budget, limit);
    return memory;
}

// Adds a request's vision tower, if any, to what is planned for. type: of the main device's buffers.
void add_vision_tower(SessionNeeds& needs, const std::string& mmproj, const Hparams& hp,
                      ggml_backend_buffer_type_t type) {
    if (mmproj.empty()) return;
    const auto file = GgufFile::open_all_parts(mmproj);
    const VisionHparams vision(*file);
    vision.require_size(*file, hp.n_embd);
    const VisionMemory memory = vision_memory(*file, vision, type);
    needs.image_tokens = kMaxSoftTokens;
    needs.usual_image_tokens = vision.max_soft_tokens;
    needs.vision_weights = memory.weights;
    needs.vision_work = memory.work;
}

SessionNeeds needs_of(const DeviceRequest& request, const Hparams& hp, ggml_type kv_type,
                      const std::vector<DeviceMemory>& memory) {
    SessionNeeds needs = {std::min<int64_t>(request.n_ctx, hp.n_ctx_train), kv_type,
                          static_cast<uint64_t>(request.n_sessions)};
    add_vision_tower(needs, request.mmproj, hp,
                     memory.empty() ? ggml_backend_cpu_buffer_type() : memory.back().type);
    return needs;
}

DenseType dense_type_of(const std::string& name) {
    if (name == "auto") return DenseType::automatic;
    if (name == "file") return DenseType::file;
    if (name == "bf16") return DenseType::bf16;
    throw Error(ErrorKind::argument, "dense_type must be 'auto', 'file' or 'bf16', not " + quoted(name));
}

ResolvedDevices resolve_devices(const GgufFile& file, const DeviceRequest& request, ggml_type kv_type) {
    if (request.device == "cpu") return {};
    if (request.n_sessions < 1 || request.n_sessions > kMaxSessions)
        throw Error(ErrorKind::argument, format("n_sessions must be 1 to %d", kMaxSessions));
    std::vector<std::string> devices;
    std::vector<DeviceMemory> memory;
    std::istringstream names(request.device);
    for (std::string name; std::getline(names, name, ',');) {
        const size_t i = devices.size();
        memory.push_back(
            device_memory(name, i < request.memory_limits.size() ? request.memory_limits[i] : 0));
        devices.push_back(name);
    }
    if (devices.empty() || (!request.memory_limits.empty() && request.memory_limits.size() != devices.size()))
        throw Error(ErrorKind::argument,
                    format("got %zu devices and %zu memory limits: give one limit per device", devices.size(),
                           request.memory_limits.size()));
    const Hparams hp(file);
    const SessionNeeds needs = needs_of(request, hp, kv_type, memory);
    const DevicePlan device_plan = plan_devices(file, hp, needs, memory, request.n_gpu_layers,
                                                request.n_cpu_moe, dense_type_of(request.dense_type));
    // Drop devices without layers, except for the main device.
    ResolvedDevices used;
    used.needs = needs;
    used.device_plan = device_plan;
    used.device_plan.device_layers.clear();
    const int32_t main = device_plan.main_device();
    for (int32_t i = 0; i <= main; ++i) {
        if (device_plan.device_layers[i] == 0 && i != main) continue;
        used.devices.push_back(devices[i]);
        used.memory.push_back(memory[i]);
        used.device_plan.device_layers.push_back(device_plan.device_layers[i]);
    }
    return used;
}

PyModel load_model(const std::string& path, int n_threads, const std::string& kv_type,
                   const DeviceRequest& request, const nb::object& progress) {
    if (n_threads < 1 || n_threads > 512) throw Error(ErrorKind::argument, "n_threads must be 1 to 512");
    if (kv_type != "auto" && kv_type != "f32" && kv_type != "f16" && kv_type != "q8_0") {
        throw Error(ErrorKind::argument,
                    "kv_type must be 'auto', 'f32', 'f16' or 'q8_0', not " + quoted(kv_type));
    }
    const auto on_progress = [&](double fraction) { report(progress, fraction); };
    const WithoutGil release;
    PyModel result;
    auto file = GgufFile::open_all_parts(path);
    result.kv_type = cache_type(*file, kv_type);
    const ResolvedDevices resolved = resolve_devices(*file, request, result.kv_type);
    result.model = std::make_shared<Model>(file, n_threads, resolved.device(), request.kernels,
                                           resolved.device_plan, on_progress);
    return result;
}

nb::dict hparams_dict(const Hparams& hp) {
    nb::dict d;
    d["n_layer"] = hp.n_layer;
    d["n_ctx_train"] = hp.n_ctx_train;
    d["n_embd"] = hp.n_embd;
    d["n_vocab"] = hp.n_vocab;
    d["n_ff"] = hp.n_ff;
    d["n_ff_expert"] = hp.n_ff_expert;
    d["n_expert"] = hp.n_expert;
    d["n_expert_used"] = hp.n_expert_used;
    d["n_head"] = hp.n_head;
    d["window"] = hp.window;
    d["canvas_length"] = hp.canvas_length;
    d["rms_eps"] = hp.rms_eps;
    d["soft_cap"] = hp.soft_cap;
    d["rope_base"] = hp.rope_base;
    d["rope_base_swa"] = hp.rope_base_swa;
    nb::list sliding, head_dim, n_head_kv;
    for (const LayerShape& shape : hp.layers) {
        sliding.append(shape.sliding);
        head_dim.append(shape.head_dim);
        n_head_kv.append(shape.n_head_kv);
    }
    d["sliding"] = sliding;
    d["head_dim"] = head_dim;
    d["n_head_kv"] = n_head_kv;
    for (const SamplerOption& option : sampler_table(hp.architecture->sampler()).options)
        d[option.name] = option_value(option, hp.sampler.at(option.name));
    return d;
}

// Empty if the model reads no images.
nb::typed<nb::dict, nb::str, int> image_tokens(const Hparams& hp) {
    nb::dict d;
    if (hp.image_tokens.any()) {
        d["image"] = hp.image_tokens.image;
        d["begin"] = hp.image_tokens.begin;
        d["end"] = hp.image_tokens.end;
    }
    return nb::typed<nb::dict, nb::str, int>(d);
}

const char* name_of_dense_type(const DevicePlan& plan) { return plan.dense_bf16 ? "bf16" : "file"; }

nb::dict description(const PyModel& m) {
    nb::dict d;
    d["backend"] = m.model->backend.name();
    d["kernels"] = m.model->backend.kernel_name();
    d["n_gpu_layers"] = m.model->device_plan.n_gpu_layers();
    nb::list device_layers;
    for (const int32_t n : m.model->device_plan.device_layers) device_layers.append(n);
    d["device_layers"] = device_layers;
    d["n_cpu_moe"] = m.model->device_plan.n_cpu_moe;
    d["dense_type"] = name_of_dense_type(m.model->device_plan);
    d["repacked_experts"] = m.model->weights.repacked_experts;
    d["n_threads"] = m.model->backend.n_threads();
    d["kv_type"] = ggml_type_name(m.kv_type);
    d["weight_types"] = weight_types(m.model->weights);
    d["n_weights"] = m.model->weights.n_weights;
    d["n_bytes"] = m.model->file->n_bytes_of_all_parts();
    return d;
}

nb::list devices() {
    nb::list result;
    for (const DeviceInfo& info : list_devices()) {
        nb::dict d;
        d["name"] = info.name;
        d["description"] = info.description;
        d["free_bytes"] = info.free_bytes;
        d["total_bytes"] = info.total_bytes;
        result.append(d);
    }
    return result;
}

nb::dict to_dict(const DeviceUse& use) {
    nb::dict d;
    d["weight_bytes"] = use.weights;
    d["cache_bytes"] = use.cache;
    d["step_bytes"] = use.step;
    return d;
}

nb::dict plan(const std::string& path, const std::string& device, const std::vector<uint64_t>& memory_limits,
              int32_t n_gpu_layers, int32_t n_cpu_moe, int64_t n_ctx, const std::string& kv_type,
              int64_t n_sessions, const std::string& dense_type, const std::string& mmproj) {
    const auto opened = GgufFile::open_all_parts(path);
    const GgufFile& file = *opened;
    const Hparams hp(file);
    const ggml_type type = cache_type(file, kv_type);
    const DeviceRequest request = {device,     n_gpu_layers, n_cpu_moe,  memory_limits, n_ctx,
                                   n_sessions, "auto",       dense_type, mmproj};
    const ResolvedDevices resolved = resolve_devices(file, request, type);
    const DevicePlan& device_plan = resolved.device_plan;
    if (device == "cpu") needs_of(request, hp, type, {});  // nothing is planned, but a broken tower is told
    nb::list shares;
    if (device_plan.any()) {
        const std::vector<DeviceUse> uses =
            device_use(file, hp, device_plan, resolved.needs, resolved.memory);
        for (size_t i = 0; i < uses.size(); ++i) {
            nb::dict share = to_dict(uses[i]);
            share["device"] = resolved.devices[i];
            share["n_layers"] = device_plan.device_layers[i];
            shares.append(share);
        }
    }
    nb::dict d;
    d["device"] = resolved.device();
    d["n_layer"] = hp.n_layer;
    d["n_gpu_layers"] = device_plan.n_gpu_layers();
    d["n_cpu_moe"] = device_plan.n_cpu_moe;
    d["dense_type"] = name_of_dense_type(device_plan);
    d["shares"] = shares;
    return d;
}

// Of a model that is not written yet, all of it on one device.
nb::dict memory_use(const nb::bytes& header, int64_t n_ctx) {
    if (n_ctx < 1)
        throw Error(ErrorKind::argument, format("n_ctx is %lld; permitted is an integer of at least 1",
                                                static_cast<long long>(n_ctx)));
    const auto file = GgufFile::from_header(static_cast<const uint8_t*>(header.data()), header.size(),
                                            "the header of the planned file");
    const Hparams hp(*file);
    const SessionNeeds needs = {std::min<int64_t>(n_ctx, hp.n_ctx_train), cache_type(*file, "auto"), 1};
    const std::vector<DeviceMemory> memory = {{ggml_backend_cpu_buffer_type(), 0, 0}};
    const DeviceUse use = device_use(*file, hp, {hp.n_layer, {hp.n_layer}, 0}, needs, memory).front();
    nb::dict d = to_dict(use);
    d["reserved_bytes"] = smallest_device(use.total()) - use.total();
    return d;
}

}  // namespace

nb::dict weight_types(const LoadedTensors& weights) {
    nb::dict types;
    for (const auto& [type, n_bytes] : weights.bytes_by_type) types[upper_type_name(type).c_str()] = n_bytes;
    return types;
}

void bind_model(nb::module_& m) {
    nb::class_<PyModel>(m, "Model", "Weights and hyperparameters; immutable, shared by sessions and threads.")
        .def(
            "__init__",
            [](PyModel* self, const nb::str& path, int n_threads, const std::string& kv_type,
               const nb::object& progress, const std::string& device, int32_t n_gpu_layers, int32_t n_cpu_moe,
               const std::vector<uint64_t>& memory_limits, int64_t n_ctx, const std::string& kernels,
               int64_t n_sessions, const std::string& dense_type, const nb::str& mmproj) {
                const DeviceRequest request = {device,     n_gpu_layers, n_cpu_moe,  memory_limits,   n_ctx,
                                               n_sessions, kernels,      dense_type, from_str(mmproj)};
                new (self) PyModel(load_model(from_str(path), n_threads, kv_type, request, progress));
            },
            nb::arg("path"), nb::arg("n_threads"), nb::arg("kv_type") = "auto",
            nb::arg("progress") = nb::none(), nb::arg("device") = "cpu", nb::arg("n_gpu_layers") = -1,
            nb::arg("n_cpu_moe") = -1, nb::arg("memory_limits") = nb::list(), nb::arg("n_ctx") = 8192,
            nb::arg("kernels") = "auto", nb::arg("n_sessions") = 1, nb::arg("dense_type") = "auto",
            nb::arg("mmproj") = "")
        .def_prop_ro("file",
                     [](const PyModel& m) { return std::const_pointer_cast<GgufFile>(m.model->file); })
        .def_prop_ro("hparams", [](const PyModel& m) { return hparams_dict(m.model->hparams); })
        .def_prop_ro("description", description)
        .def_prop_ro("n_vocab", [](const PyModel& m) { return m.model->hparams.n_vocab; })
        .def_prop_ro("canvas_length", [](const PyModel& m) { return m.model->hparams.canvas_length; })
        .def_prop_ro("image_tokens", [](const PyModel& m) { return image_tokens(m.model->hparams); })
        .def_prop_ro("bidirectional_images",
                     [](const PyModel& m) { return m.model->hparams.bidirectional_images; })
        .def_prop_ro("n_ctx_train", [](const PyModel& m) { return m.model->hparams.n_ctx_train; })
        .def_prop_ro("n_threads", [](const PyModel& m) { return m.model->backend.n_threads(); });
    m.def("devices", devices, "The GPUs that this build can use.");
    m.def("why_no_device", why_no_device, nb::arg("name"),
          "Why a name that is not in devices() can't be used.");
    m.def("plan", plan, nb::arg("path"), nb::arg("device"), nb::arg("memory_limits") = nb::list(),
          nb::arg("n_gpu_layers") = -1, nb::arg("n_cpu_moe") = -1, nb::arg("n_ctx") = 8192,
          nb::arg("kv_type") = "auto", nb::arg("n_sessions") = 1, nb::arg("dense_type") = "auto",
          nb::arg("mmproj") = "",
          "Plan which layers and experts go to which device, with the memory that each needs; with the file "
          "of a vision tower also that of the tower, which the main device has.");
    m.def(
        "memory_use", memory_use, nb::arg("header"), nb::arg("n_ctx"),
        "Memory that a model takes on a device with one session, from the header of its file alone: dict of "
        "weight_bytes, cache_bytes, step_bytes, and reserved_bytes to keep free besides.");
}

}  // namespace pydiffusion
