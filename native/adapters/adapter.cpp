#include "adapters/adapter.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "util/error.h"

namespace pydiffusion {

namespace {

// Matrices that can be adapted, by their names without ".weight" and without "blk.N.".
constexpr const char* kInLayers[] = {"attn_q",        "attn_k",      "attn_v",           "attn_output",
                                     "ffn_gate",      "ffn_up",      "ffn_down",         "ffn_gate_inp",
                                     "ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps", "ffn_down_exps"};
constexpr const char* kElsewhere[] = {"self_cond_gate", "self_cond_up", "self_cond_down"};

constexpr size_t kMostSpare = size_t{16} << 20;  // bytes of a buffer that the next factors may fill

std::string suffix_of(const std::string& tensor) {
    const size_t dot = tensor.find('.', 4);
    return tensor.rfind("blk.", 0) == 0 && dot != std::string::npos ? tensor.substr(dot + 1) : tensor;
}

template <size_t n>
bool is_one_of(const std::string& name, const char* const (&names)[n]) {
    return std::any_of(names, names + n, [&name](const char* known) { return name == known; });
}

bool ends_with(const std::string& name, const std::string& ending) {
    return name.size() >= ending.size() &&
           name.compare(name.size() - ending.size(), ending.size(), ending) == 0;
}

// A change that is being added.
struct Change {
    const std::string& adapter;
    const std::string& tensor;

    [[noreturn]] void refuse(const std::string& what) const {
        throw Error(ErrorKind::argument, "adapter " + quoted(adapter) + ": " + quoted(tensor) + " " + what);
    }
};

// Whether `length` is one that the other was padded to, or the other way round: to a multiple of the blocks
// of quantized types.
bool is_padding(int64_t length, int64_t other) {
    const int64_t longer = std::max(length, other), n = longer - std::min(length, other);
    return n == 0 || (longer % 256 == 0 && n < 256) || (longer % 32 == 0 && n < 32);
}

std::string shape_of(const Array& array) {
    std::string text = "(";
    for (size_t i = 0; i < array.shape.size(); ++i)
        text += format(i ? ", %lld" : "%lld", static_cast<long long>(array.shape[i]));
    return text + ")";
}

// Rows [first, first + n) of a source, which fill those from `at` on of a matrix, `n_rows` of them: fewer are
// followed by zeros, more must end in zeros.
struct Segment {
    int64_t first, n;
    int64_t at, n_rows;
};

// Every matrix of the source as n_rows rows of row_length; what no segment fills is 0.
std::vector<float> fitted(const Change& change, const char* what, const Array& source,
                          const std::vector<Segment>& segments, int64_t n_rows, int64_t row_length) {
    std::vector<float> result(source.n_matrices() * n_rows * row_length, 0.0f);
    const int64_t n_source = source.row_length(), n_kept = std::min(n_source, row_length);
    const auto is_zero = [](float x) { return x == 0.0f; };
    const auto copy_row = [&](const float* row, bool kept, float* target) {
        if (kept) std::copy_n(row, n_kept, target);
        if (std::all_of(row + (kept ? n_kept : 0), row + n_source, is_zero)) return;
        change.refuse(format("is longer than the model's matrix: its %s has the shape ", what) +
                      shape_of(source) + ", and what is too much is not 0: it is for another model");
    };
    for (int64_t matrix = 0; matrix < source.n_matrices(); ++matrix) {
        for (const Segment& segment : segments) {
            for (int64_t i = 0; i < segment.n; ++i) {
                const float* row = source.values + (matrix * source.n_rows() + segment.first + i) * n_source;
                const bool kept = i < segment.n_rows;
                copy_row(row, kept,
                         kept ? result.data() + (matrix * n_rows + segment.at + i) * row_length : nullptr);
            }
        }
    }
    return result;
}

void require_finite(const Change& change, const char* what, const Array& array) {
    int64_t n = 1;
    for (const int64_t length : array.shape) n *= length;
    const bool finite = std::all_of(array.values, array.values + n, [](float x) { return std::isfinite(x); });
    if (!finite) change.refuse(format("has values in its %s that are NaN or infinite", what));
}

// Finite values may be too large for BF16, which has fewer digits: they would be rounded to infinity.
std::vector<ggml_bf16_t> to_bf16(const Change& change, const char* what, const std::vector<float>& values) {
    constexpr uint16_t exponent = 0x7f80;
    std::vector<ggml_bf16_t> rounded(values.size());
    ggml_fp32_to_bf16_row(values.data(), rounded.data(), static_cast<int64_t>(values.size()));
    const auto is_finite = [](ggml_bf16_t x) { return (x.bits & exponent) != exponent; };
    if (!std::all_of(rounded.begin(), rounded.end(), is_finite))
        change.refuse(format(
            "has values in its %s that are too large for BF16: their size must be below 3.39e38", what));
    return rounded;
}

// Checks what does not depend on the model's matrix.
void check_arrays(const Change& change, const Array& a, const Array& b, bool experts) {
    const size_t n_dims = experts ? 3 : 2;
    const auto refuse = [&](const char* what) {
        change.refuse(std::string(what) + ": a has the shape " + shape_of(a) + ", b " + shape_of(b));
    };
    if (a.shape.size() != n_dims || b.shape.size() != n_dims)
        refuse(experts ? "needs (n_expert, rank, n_in) and (n_expert, n_out, rank)"
                       : "needs (rank, n_in) and (n_out, rank)");
    const auto is_empty = [](const Array& array) {
        return std::any_of(array.shape.begin(), array.shape.end(), [](int64_t n) { return n < 1; });
    };
    if (is_empty(a) || is_empty(b)) refuse("is empty");
    if (a.n_rows() != b.row_length()) refuse("has two ranks");
    require_finite(change, "a", a);
    require_finite(change, "b", b);
}

// Refuses a matrix that can't be adapted, or not for this side; returns its name without "blk.N.".
std::string checked_suffix(const Change& change, const std::string& side) {
    const std::string suffix = suffix_of(change.tensor);
    const bool in_layer = change.tensor != suffix && is_one_of(suffix, kInLayers);
    if (!in_layer && !is_one_of(change.tensor, kElsewhere)) change.refuse("is no matrix that can be adapted");
    if (side != "encoder" && side != "decoder" && side != "both")
        change.refuse("is for " + quoted(side) + ": permitted are 'encoder', 'decoder' and 'both'");
    if (!in_layer && side == "encoder")
        change.refuse("is for the encoder, which has no self-conditioning: it must be for the decoder");
    return suffix;
}

// A matrix of the file that a change is for, and the rows of b for it.
struct Part {
    const ggml_tensor* matrix;
    std::vector<Segment> segments;
};

// find: a tensor of the file by its name; null if there is none.
template <typename Find>
std::vector<Part> parts_of(const Change& change, const std::string& suffix, int64_t n, const Find& find) {
    const std::string prefix = change.tensor.substr(0, change.tensor.size() - suffix.size());
    const bool both = suffix == "ffn_gate_up_exps";
    if (both && n % 2)
        change.refuse(
            format("has %lld rows in b: gate's and up's must be as many", static_cast<long long>(n)));
    if (const ggml_tensor* matrix = find(change.tensor)) {
        const int64_t half = matrix->ne[1] / 2;
        if (both) return {{matrix, {{0, n / 2, 0, half}, {n / 2, n / 2, half, half}}}};
        return {{matrix, {{0, n, 0, matrix->ne[1]}}}};
    }
    if (both) {
        const ggml_tensor *gate = find(prefix + "ffn_gate_exps"), *up = find(prefix + "ffn_up_exps");
        if (gate && up) return {{gate, {{0, n / 2, 0, gate->ne[1]}}}, {up, {{n / 2, n / 2, 0, up->ne[1]}}}};
    }
    const bool gate = suffix == "ffn_gate_exps";
    if (gate || suffix == "ffn_up_exps") {
        if (const ggml_tensor* matrix = find(prefix + "ffn_gate_up_exps")) {
            const int64_t half = matrix->ne[1] / 2;
            return {{matrix, {{0, n, gate ? 0 : half, half}}}};
        }
    }
    change.refuse("is not in the model");
}

// Refuses shapes that are not those of the parts, where feed-forward lengths may be padded.
void check_fit(const Change& change, const std::string& suffix, const Array& a, const Array& b,
               const std::vector<Part>& parts) {
    const bool is_down = ends_with(suffix, "_down") || suffix == "ffn_down_exps";
    const bool pads_rows = !is_down && suffix != "ffn_gate_inp" && suffix.rfind("attn_", 0) != 0;
    const auto fits = [](int64_t has, int64_t wanted, bool may_pad) {
        return has == wanted || (may_pad && is_padding(has, wanted));
    };
    const ggml_tensor* matrix = parts[0].matrix;
    bool fit = fits(a.row_length(), matrix->ne[0], is_down) && a.n_matrices() == matrix->ne[2] &&
               b.n_matrices() == matrix->ne[2];
    for (const Part& part : parts) {
        for (const Segment& segment : part.segments) fit = fit && fits(segment.n, segment.n_rows, pads_rows);
    }
    if (fit) return;
    const auto number = [](int64_t n) { return std::to_string(n); };
    const std::string experts =
        matrix->ne[2] > 1 ? ", for each of " + number(matrix->ne[2]) + " experts" : "";
    change.refuse("does not fit the model: a has the shape " + shape_of(a) + ", b " + shape_of(b) +
                  ", but the model's " + matrix->name + " has " + number(matrix->ne[0]) + " inputs and " +
                  number(matrix->ne[1]) + " outputs" + experts);
}

}  // namespace

void Adapter::place(ggml_tensor* factor, ggml_backend_buffer_type_t type) {
    const size_t alignment = ggml_backend_buft_get_alignment(type);
    const size_t needed = GGML_PAD(ggml_backend_buft_get_alloc_size(type, factor), alignment);
    ggml_tallocr& free = free_[type];
    if (!free.buffer || ggml_backend_buffer_get_size(free.buffer) - free.offset < needed) {
        // Factors come one at a time: a new buffer has room for as much as there is already.
        const size_t least = needed + alignment, spare = std::min<size_t>(n_bytes_, kMostSpare);
        ggml_backend_buffer_ptr buffer(ggml_backend_buft_alloc_buffer(type, least + spare));
        if (!buffer) buffer.reset(ggml_backend_buft_alloc_buffer(type, least));
        if (!buffer) {
            throw Error(ErrorKind::out_of_memory,
                        format("out of memory: failed to allocate %.1f MB of adapter ",
                               static_cast<double>(least) / 1e6) +
                            quoted(name_) + " on " + ggml_backend_buft_name(type));
        }
        ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        buffers_.push_back(std::move(buffer));
        free = ggml_tallocr_new(buffers_.back().get());
    }
    if (ggml_tallocr_alloc(&free, factor) != GGML_STATUS_SUCCESS)
        throw Error(ErrorKind::general, "failed to place " + quoted(factor->name) + " in memory");
}

ggml_tensor* Adapter::store(const ggml_tensor* matrix, const std::string& tensor, const char* factor,
                            const std::vector<float>& values, const std::vector<int64_t>& ne) {
    const ggml_init_params params = {ggml_tensor_overhead(), nullptr, true};
    require_memory((size_t{1} << 20) + params.mem_size);
    ggml_context_ptr context(ggml_init(params));
    if (!context) throw Error(ErrorKind::out_of_memory, "out of memory: failed to load an adapter");
    ggml_backend_buffer_type_t buffer_type = ggml_backend_buffer_get_type(matrix->buffer);
    const bool on_host = ggml_backend_buft_is_host(buffer_type);
    if (on_host) buffer_type = ggml_backend_cpu_buffer_type();
    const bool is_f32 = matrix->type == GGML_TYPE_F32 || !(on_host || devices_hold_bf16_);
    ggml_tensor* stored = ggml_new_tensor(context.get(), is_f32 ? GGML_TYPE_F32 : GGML_TYPE_BF16,
                                          static_cast<int>(ne.size()), ne.data());
    ggml_set_name(stored, (tensor + ".lora_" + factor).c_str());
    std::vector<ggml_bf16_t> rounded;
    const void* data = values.data();
    if (!is_f32) {
        rounded = to_bf16(Change{name_, tensor}, factor, values);
        data = rounded.data();
    }
    const auto lock = model_->backend.lock_devices();
    place(stored, buffer_type);
    ggml_backend_tensor_set(stored, data, 0, ggml_nbytes(stored));
    n_bytes_ += ggml_nbytes(stored);
    contexts_.push_back(std::move(context));
    return stored;
}

void Adapter::require_first(const std::string& tensor, const std::string& side) {
    const size_t both = tensor.find("gate_up_exps");
    if (both != std::string::npos) {  // gate and up together: none of them may have another change
        require_first(tensor.substr(0, both) + "gate_exps", side);
        return require_first(tensor.substr(0, both) + "up_exps", side);
    }
    for (const char* one : {"encoder", "decoder"}) {
        if (side != one && side != "both") continue;
        if (!known_.insert(tensor + " " + one).second)
            Change{name_, tensor}.refuse(std::string("has two changes for the ") + one);
    }
}

void Adapter::add(const std::string& tensor, const std::string& side, const Array& a, const Array& b) {
    const Change change = {name_, tensor};
    const std::string suffix = checked_suffix(change, side);
    check_arrays(change, a, b, ends_with(suffix, "_exps"));
    const std::vector<Part> parts = parts_of(change, suffix, b.n_rows(), [this](const std::string& name) {
        return model_->weights.find(name + ".weight");
    });
    check_fit(change, suffix, a, b, parts);
    require_first(tensor, side);

    const int64_t n_inner = parts[0].matrix->ne[0], rank = a.n_rows(), n_expert = a.n_matrices();
    const ggml_tensor* matrix = parts[0].matrix;
    ggml_tensor* stored_a =
        store(matrix, tensor, "a", fitted(change, "a", a, {{0, rank, 0, rank}}, rank, n_inner),
              {n_inner, rank, n_expert});
    for (const Part& part : parts) {
        const int64_t n_rows = part.matrix->ne[1];
        ggml_tensor* stored_b =
            store(part.matrix, tensor, "b", fitted(change, "b", b, part.segments, n_rows, rank),
                  {rank, n_rows, n_expert});
        if (side != "decoder") changes_[0][part.matrix].push_back({stored_a, stored_b});
        if (side != "encoder") changes_[1][part.matrix].push_back({stored_a, stored_b});
    }
    n_targets_ += 1;
    rank_ = std::max(rank_, rank);
}

AdapterList effective(const AdapterList& adapters) {
    AdapterList result;
    for (const ActiveAdapter& one : adapters) {
        if (one.scale != 0.0f) result.push_back(one);
    }
    return result;
}

}  // namespace pydiffusion
