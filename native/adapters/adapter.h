// Adapter (LoRA): low-rank changes of a model's matrices, for each of its two modes.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-cpp.h"
#include "model/model.h"

namespace pydiffusion {

// Which mode a change is for: a prompt or a finished canvas is read, or a canvas is denoised.
enum class Side { encoder, decoder };

// Row-major values of an array: (n_rows, row_length), of experts (n_expert, n_rows, row_length).
struct Array {
    const float* values;
    std::vector<int64_t> shape;

    int64_t n_matrices() const { return shape.size() == 3 ? shape[0] : 1; }
    int64_t n_rows() const { return shape[shape.size() - 2]; }
    int64_t row_length() const { return shape.back(); }
};

class Adapter {
  public:
    // A matrix's results change by b (a x).
    struct Factors {
        ggml_tensor* a;  // [n_inner, rank], of experts [n_inner, rank, n_expert]
        ggml_tensor* b;  // [rank, n_rows], of experts [rank, n_rows, n_expert]
    };
    using Changes = std::unordered_map<const ggml_tensor*, std::vector<Factors>>;

    Adapter(std::shared_ptr<const Model> model, std::string name)
        : model_(std::move(model)),
          name_(std::move(name)),
          devices_hold_bf16_(model_->backend.can_hold(GGML_TYPE_BF16)) {}
    Adapter(const Adapter&) = delete;
    Adapter& operator=(const Adapter&) = delete;

    // Adds the change b a of a matrix, by its name in the file without ".weight"; side: "encoder", "decoder",
    // or "both". Converts a and b to BF16, unless the matrix is F32 or its
    // device can't compute with BF16, beside the matrix. Feed-forward lengths
    // may be those before the file's were padded. ffn_gate_up_exps is split for a file that has the two
    // apart; ffn_gate_exps and ffn_up_exps change their half of it. Throws Error(argument) for a matrix that
    // can't be adapted, shapes that don't fit it, values that are not finite; with the tensor's name.
    void add(const std::string& tensor, const std::string& side, const Array& a, const Array& b);

    const Model& model() const { return *model_; }
    const std::string& name() const { return name_; }
    uint64_t n_bytes() const { return n_bytes_; }
    int32_t n_targets() const { return n_targets_; }  // calls of add()
    int64_t rank() const { return rank_; }            // the largest
    // By matrix.
    const Changes& changes(Side side) const { return changes_[side == Side::decoder]; }

  private:
    void require_first(const std::string& tensor, const std::string& side);
    // A factor, "a" or "b", of a tensor's change.
    ggml_tensor* store(const ggml_tensor* matrix, const std::string& tensor, const char* factor,
                       const std::vector<float>& values, const std::vector<int64_t>& ne);
    void place(ggml_tensor* factor, ggml_backend_buffer_type_t type);

    std::shared_ptr<const Model> model_;
    std::string name_;
    bool devices_hold_bf16_;
    Changes changes_[2];           // of the encoder, of the decoder
    std::set<std::string> known_;  // tensors with their sides
    std::vector<ggml_context_ptr> contexts_;
    std::vector<ggml_backend_buffer_ptr> buffers_;
    std::map<ggml_backend_buffer_type_t, ggml_tallocr> free_;  // where the next factors go
    uint64_t n_bytes_ = 0;
    int32_t n_targets_ = 0;
    int64_t rank_ = 0;
};

// An adapter that a session uses, and the factor of its changes.
struct ActiveAdapter {
    std::shared_ptr<const Adapter> adapter;
    float scale;

    bool operator==(const ActiveAdapter& other) const {
        return adapter == other.adapter && scale == other.scale;
    }
};
using AdapterList = std::vector<ActiveAdapter>;

// Which adapters a list had, without keeping them in memory: those that are gone equal no others.
class AdapterMarks {
  public:
    AdapterMarks() = default;
    AdapterMarks(const AdapterList& adapters) {
        for (const ActiveAdapter& one : adapters) marks_.push_back({one.adapter, one.scale});
    }
    bool operator==(const AdapterMarks& other) const { return marks_ == other.marks_; }

  private:
    struct Mark {
        std::weak_ptr<const Adapter> adapter;
        float scale;

        bool operator==(const Mark& other) const {
            return !adapter.owner_before(other.adapter) && !other.adapter.owner_before(adapter) &&
                   scale == other.scale;
        }
    };
    std::vector<Mark> marks_;
};

// Those that change anything: of a scale other than 0.
AdapterList effective(const AdapterList& adapters);

}  // namespace pydiffusion
