#include "model/weights_loader.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <system_error>
#include <thread>

#include "backend/repacked_weights.h"
#include "ggml-cpu.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

// Tensor alignment that ggml's CPU kernels need; a mapping has it unless the file's own alignment is smaller.
constexpr uint64_t kAlignment = 32;

// Weights converted to another type and uploaded at a time; a multiple of any block.
constexpr int64_t kWidenedAtOnce = int64_t{16} << 20;

constexpr uint64_t kUploadBytes = uint64_t{64} << 20;  // of other weights

constexpr char kWeight[] = ".weight", kScale[] = ".scale", kInputScale[] = ".input_scale";

bool ends_with(const std::string& name, const char* ending) {
    const size_t n = std::strlen(ending);
    return name.size() >= n && name.compare(name.size() - n, n, ending) == 0;
}

// The name with another ending.
std::string renamed(const std::string& name, const char* ending, const char* other) {
    return name.substr(0, name.size() - std::strlen(ending)) + other;
}

std::string scale_of(const std::string& matrix) { return renamed(matrix, kWeight, kScale); }

std::string describe(const Shape& shape) {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); ++i) {
        text += format(i ? ", %lld" : "%lld", static_cast<long long>(shape[i]));
    }
    return text + "]";
}

bool same_shape(const TensorInfo& tensor, const Shape& shape) {
    for (size_t i = 0; i < GGML_MAX_DIMS; ++i) {
        if (tensor.dimension(i) != (i < shape.size() ? shape[i] : 1)) return false;
    }
    return true;
}

// Whether ggml's CPU backend has a matmul for the type and its rows can be dequantized.
bool is_supported(ggml_type type) {
    if (type == GGML_TYPE_F32) return true;
    const ggml_type_traits_cpu* cpu = ggml_get_type_traits_cpu(type);
    if (!cpu->vec_dot || !ggml_get_type_traits(type)->to_float) return false;
    return cpu->vec_dot_type == GGML_TYPE_F32 ||
           ggml_get_type_traits_cpu(cpu->vec_dot_type)->from_float != nullptr;
}

// Calls work_on(first, n) for [0, n) in pieces, on several threads; one that can't be started is done
// without.
template <typename Work>
void share(int64_t n, int64_t piece, int n_threads, const Work& work_on) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        for (int64_t first = piece * next++; first < n; first = piece * next++)
            work_on(first, std::min(piece, n - first));
    };
    std::vector<std::thread> threads;
    threads.reserve(n_threads);
    try {
        for (int i = 1; i < n_threads; ++i) threads.emplace_back(work);
    } catch (const std::system_error&) {
    }
    work();
    for (std::thread& thread : threads) thread.join();
}

// Converts n quantized weights, a multiple of a block, to BF16.
void widen(ggml_type type, const uint8_t* data, int64_t n, int n_threads, ggml_bf16_t* out) {
    constexpr int64_t piece = 4096;  // a multiple of any block
    share(n, piece, n_threads, [&](int64_t first, int64_t n_here) {
        float weights[piece];
        ggml_get_type_traits(type)->to_float(data + ggml_row_size(type, first), weights, n_here);
        ggml_fp32_to_bf16_row(weights, out + first, n_here);
    });
}

// Repacks rows for our kernels; n_rows is a multiple of kRepackedRows.
void repack(const ggml_tensor* tensor, const uint8_t* data, int64_t n_rows, int n_threads, uint8_t* out) {
    const auto row_size = static_cast<int64_t>(ggml_row_size(tensor->type, tensor->ne[0]));
    share(n_rows, kRepackedRows, n_threads, [&](int64_t first, int64_t n) {
        repack_rows(tensor->type, data + first * row_size, n, tensor->ne[0], out + first * row_size);
    });
}

}  // namespace

WeightsLoader::WeightsLoader(LoadedTensors& weights, const GgufFile& file, const DevicePlan& device_plan,
                             const Backend& backend)
    : weights_(weights), file_(file), device_plan_(device_plan), backend_(backend) {
    // The matrices of every layer may be views of concatenated ones.
    const ggml_init_params params = {2 * (file.tensors().size() + 1) * ggml_tensor_overhead(), nullptr, true};
    require_memory((size_t{8} << 20) + params.mem_size);
    for (int32_t device = kCpuDevice; device < backend.n_devices(); ++device) {
        weights_.contexts_.emplace_back(ggml_init(params));
        if (!weights_.contexts_.back())
            throw Error(ErrorKind::out_of_memory, "out of memory: failed to allocate the tensor descriptors");
    }
    for (size_t i = 0; i < file.n_parts(); ++i) mapped_.push_back(map(file.part(i)));
}

WeightMatrix WeightsLoader::matrix(const std::string& name, const Shape& shape) {
    WeightMatrix matrix = {create(require_matrix(name, shape), device_plan_.tensor_device(name))};
    const std::string scale = scale_of(name);
    if (!has(scale)) return matrix;
    f32_on(kCpuDevice, scale, {1});
    require_finite(scale);
    matrix.scale = values(scale)[0];
    return matrix;
}

ggml_tensor* WeightsLoader::tensor(const std::string& name, const Shape& shape) {
    return create(require_matrix(name, shape), device_plan_.tensor_device(name));
}

ggml_tensor* WeightsLoader::expert_scales(const std::string& name, int64_t n_expert) {
    const std::string scale = scale_of(name);
    if (!has(scale)) return nullptr;
    ggml_tensor* scales = f32(scale, {n_expert});
    require_finite(scale);
    return scales;
}

ggml_tensor* WeightsLoader::concatenated(int64_t d,
                                         const std::vector<std::pair<std::string, int64_t>>& parts) {
    const int32_t device = device_plan_.tensor_device(parts[0].first);
    if (device == kCpuDevice || !can_hold(GGML_TYPE_BF16)) return nullptr;
    int64_t n_rows = 0;
    for (const auto& [name, n] : parts) {
        if (device_plan_.device_type(name, require(name, {d, n}).type) != GGML_TYPE_BF16 ||
            has(scale_of(name)))
            return nullptr;
        n_rows += n;
    }
    ggml_context* context = weights_.contexts_[device - kCpuDevice].get();
    ggml_tensor* all = ggml_new_tensor_2d(context, GGML_TYPE_BF16, d, n_rows);
    int64_t first = 0;
    for (const auto& [name, n] : parts) {
        views_[name] = ggml_view_2d(context, all, d, n, all->nb[1], first * all->nb[1]);
        first += n;
    }
    return all;
}

ggml_tensor* WeightsLoader::f32_on(int32_t device, const std::string& name, const Shape& shape) {
    const TensorInfo& info = require(name, shape);
    if (info.type != GGML_TYPE_F32) {
        throw Error(ErrorKind::unsupported, file_.path() + ": tensor " + quoted(name) +
                                                " must be F32, but is " + ggml_type_name(info.type));
    }
    return create(info, device);
}

std::vector<float> WeightsLoader::values(const std::string& name) const {
    const TensorInfo& info = *file_.find_tensor(name);
    std::vector<float> values(info.n_elements());
    std::memcpy(values.data(), file_.tensor_data(info), values.size() * sizeof(float));
    return values;
}

void WeightsLoader::upload(const std::function<void(double)>& progress,
                           const std::vector<WeightMatrix>& on_device) {
    if (uploads_.empty()) return;
    for (const WeightMatrix& matrix : on_device) {
        const ggml_tensor* tensor = matrix.tensor;
        if (std::any_of(uploads_.begin(), uploads_.end(),
                        [tensor](const auto& upload) { return upload.first == tensor; }))
            continue;
        const std::string name = tensor->name;
        throw Error(ErrorKind::unsupported, file_.path() + ": tensor " + quoted(name) + " has type " +
                                                ggml_type_name(tensor->type) +
                                                ", which is not supported on " + backend_.name() +
                                                ": quantize it to another type (--tensor-type " + name +
                                                "=q6_k), or use n_gpu_layers=0");
    }
    uint64_t total = 0, done = 0;
    for (const auto& [tensor, info] : uploads_) total += info->n_bytes;
    for (int32_t device = 0; device < backend_.n_devices(); ++device) allocate_buffer(device);
    for (const auto& [tensor, info] : uploads_) {
        const bool widened = tensor->type != info->type, repacked = is_repacked(tensor);
        const uint64_t group = kRepackedRows * ggml_row_size(info->type, info->ne[0]);
        const uint64_t block = widened    ? ggml_row_size(info->type, kWidenedAtOnce)  // bytes of the file
                               : repacked ? std::max<uint64_t>(1, kUploadBytes / group) * group
                                          : kUploadBytes;
        for (uint64_t at = 0; at < info->n_bytes; at += block) {
            const uint64_t n = std::min(block, info->n_bytes - at);
            file_.require_not_truncated();
            const uint8_t* data = file_.tensor_data(*info) + at;
            if (widened) {
                upload_widened(tensor, info->type, data, at / block * kWidenedAtOnce);
            } else if (repacked) {
                repacked_.resize(n);
                repack(tensor, data, n / group * kRepackedRows, backend_.n_threads(), repacked_.data());
                ggml_backend_tensor_set(tensor, repacked_.data(), at, n);
            } else {
                ggml_backend_tensor_set(tensor, data, at, n);
            }
            done += n;
            progress(static_cast<double>(done) / static_cast<double>(total));
        }
    }
}

void WeightsLoader::refuse_unknown_tensors() const {
    for (const TensorInfo& tensor : file_.tensors()) {
        const std::string& name = tensor.name;
        const bool matters =
            name.rfind("blk.", 0) == 0 || ends_with(name, kScale) || ends_with(name, kInputScale);
        if (matters && !weights_.find(name) && !is_input_scale(name)) {
            throw Error(ErrorKind::unsupported,
                        file_.path() + ": tensor " + quoted(name) + " is not part of this architecture");
        }
    }
}

void WeightsLoader::upload_widened(ggml_tensor* tensor, ggml_type type, const uint8_t* data, int64_t first) {
    const int64_t n = std::min(kWidenedAtOnce, ggml_nelements(tensor) - first);
    widened_.resize(n);
    widen(type, data, n, backend_.n_threads(), widened_.data());
    ggml_backend_tensor_set(tensor, widened_.data(), first * sizeof(ggml_bf16_t), n * sizeof(ggml_bf16_t));
}

void WeightsLoader::allocate_buffer(int32_t device) {
    ggml_context* context = weights_.contexts_[device - kCpuDevice].get();
    if (!ggml_get_first_tensor(context)) return;
    ggml_backend_buffer_type_t type = backend_.buffer_type(device);
    const size_t n_bytes = ggml_backend_alloc_ctx_tensors_from_buft_size(context, type);
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors_from_buft(context, type);
    if (!buffer) {
        throw Error(
            ErrorKind::out_of_memory,
            format("out of memory: failed to allocate %.2f GB of weights on the device: use fewer layers "
                   "(n_gpu_layers) or more experts on the CPU (n_cpu_moe)",
                   static_cast<double>(n_bytes) / 1e9));
    }
    weights_.buffers_.emplace_back(buffer);
    ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
}

bool WeightsLoader::can_hold(ggml_type type) {
    const auto known = can_hold_.find(type);
    if (known != can_hold_.end()) return known->second;
    return can_hold_[type] = backend_.can_hold(type);
}

ggml_backend_buffer_t WeightsLoader::map(const GgufFile& file) {
    if (file.alignment() % kAlignment != 0 || file.data_offset() % kAlignment != 0) return nullptr;
    ggml_backend_buffer_t buffer =
        ggml_backend_cpu_buffer_from_ptr(const_cast<uint8_t*>(file.data()), file.n_bytes());
    weights_.buffers_.emplace_back(buffer);
    ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    return buffer;
}

bool WeightsLoader::is_input_scale(const std::string& name) const {
    if (!ends_with(name, kInputScale)) return false;
    const ggml_tensor* matrix = weights_.find(renamed(name, kInputScale, kWeight));
    return matrix && ggml_n_dims(matrix) > 1;
}

void WeightsLoader::require_finite(const std::string& name) const {
    for (const float value : values(name)) {
        if (!std::isfinite(value))
            throw Error(ErrorKind::format,
                        file_.path() + ": tensor " + quoted(name) + " holds a scale that is NaN or infinite");
    }
}

const TensorInfo& WeightsLoader::require_matrix(const std::string& name, const Shape& shape) {
    const TensorInfo& info = require(name, shape);
    if (!is_supported(info.type)) {
        throw Error(ErrorKind::unsupported, file_.path() + ": tensor " + quoted(name) + " has type " +
                                                ggml_type_name(info.type) + ": not supported");
    }
    return info;
}

const TensorInfo& WeightsLoader::require(const std::string& name, const Shape& shape) {
    const TensorInfo* info = file_.find_tensor(name);
    if (!info) throw Error(ErrorKind::format, file_.path() + ": tensor " + quoted(name) + " is missing");
    if (!same_shape(*info, shape)) {
        throw Error(ErrorKind::format, file_.path() + ": tensor " + quoted(name) + " has shape " +
                                           info->shape() + ", expected " + describe(shape) +
                                           " from the metadata");
    }
    return *info;
}

ggml_tensor* WeightsLoader::create(const TensorInfo& info, int32_t wanted) {
    ggml_type wanted_type = device_plan_.device_type(info.name, info.type);
    if (!can_hold(wanted_type)) wanted_type = info.type;
    const bool on_device = wanted != kCpuDevice && can_hold(wanted_type);
    ggml_context* context = weights_.contexts_[(on_device ? wanted : kCpuDevice) - kCpuDevice].get();
    const auto view = views_.find(info.name);
    ggml_tensor* tensor = view != views_.end()
                              ? view->second
                              : ggml_new_tensor(context, on_device ? wanted_type : info.type,
                                                static_cast<int>(info.ne.size()), info.ne.data());
    ggml_set_name(tensor, info.name.c_str());
    if (on_device) {
        if (is_expert_tensor(info.name) && backend_.repacks(tensor)) {
            mark_repacked(tensor);
            weights_.repacked_experts = true;
        }
        uploads_.emplace_back(tensor, &info);
    } else if (ggml_backend_buffer_t buffer = mapped_[info.part]) {
        ggml_backend_tensor_alloc(buffer, tensor, const_cast<uint8_t*>(file_.tensor_data(info)));
    } else {
        copy(tensor, info);
    }
    if (weights_.by_name_.emplace(info.name, tensor).second) {
        weights_.bytes_by_type[info.type] += info.n_bytes;
        weights_.n_weights += info.n_elements();
    }
    return tensor;
}

void WeightsLoader::copy(ggml_tensor* tensor, const TensorInfo& info) {
    ggml_backend_buffer_t buffer =
        ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), info.n_bytes);
    if (!buffer)
        throw Error(ErrorKind::out_of_memory,
                    "out of memory: failed to allocate tensor " + quoted(info.name));
    weights_.buffers_.emplace_back(buffer);
    ggml_backend_tensor_alloc(buffer, tensor, ggml_backend_buffer_get_base(buffer));
    std::memcpy(tensor->data, file_.tensor_data(info), info.n_bytes);
}

}  // namespace pydiffusion
