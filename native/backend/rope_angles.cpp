#include "backend/rope_angles.h"

#include <algorithm>
#include <cmath>

namespace pydiffusion {

void AxialInputs::add(GraphInputs& inputs, int32_t device, int64_t n_tokens) {
    x = inputs.add(device, GGML_TYPE_I32, n_tokens);
    y = inputs.add(device, GGML_TYPE_I32, n_tokens);
}

void AxialInputs::write(const std::vector<AxialPosition>& positions) const {
    if (!x) return;
    std::vector<int32_t> values(positions.size());
    const auto set = [&](ggml_tensor* input, int32_t AxialPosition::* axis) {
        for (size_t i = 0; i < positions.size(); ++i) values[i] = positions[i].*axis;
        ggml_backend_tensor_set(input, values.data(), 0, values.size() * sizeof(int32_t));
    };
    set(x, &AxialPosition::x);
    set(y, &AxialPosition::y);
}

ggml_tensor* RopeAngles::view(const Rope& rope, int64_t head_dim, int64_t first, int64_t n) {
    auto found = std::find_if(tables_.begin(), tables_.end(), [&](const Table& table) {
        return table.rope.device == rope.device && table.rope.base == rope.base &&
               table.rope.host_factors == rope.host_factors && table.tensor->ne[0] == head_dim;
    });
    if (found == tables_.end())
        found = tables_.insert(found, {rope, inputs_.add(rope.device, GGML_TYPE_F32, head_dim, n_tokens_)});
    ggml_tensor* all = found->tensor;
    return ggml_view_2d(ctx_, all, head_dim, n, all->nb[1], first * all->nb[1]);
}

namespace {

// Angle i of a token is position * frequency[i], with frequency[i] = 1 / (base^(2 i / head_dim) * factor[i]),
// rounded as in the reference.
std::vector<float> frequencies(const Rope& rope, int64_t head_dim) {
    std::vector<float> result(head_dim / 2);
    for (int64_t i = 0; i < head_dim / 2; ++i) {
        const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
        const float factor = rope.host_factors ? (*rope.host_factors)[i] : 1.0f;
        result[i] = 1.0f / (std::pow(rope.base, exponent) * factor);
    }
    return result;
}

// Cosines, then sines of a position's angles: returns the end of them.
float* write_angles(float* out, int32_t position, const std::vector<float>& frequency) {
    const auto n = static_cast<int64_t>(frequency.size());
    for (int64_t i = 0; i < n; ++i) {
        const float angle = static_cast<float>(position) * frequency[i];
        out[i] = std::cos(angle);
        out[n + i] = std::sin(angle);
    }
    return out + 2 * n;
}

float* write_row(float* out, int32_t position, const std::vector<float>& frequency) {
    return write_angles(out, position, frequency);
}
float* write_row(float* out, const AxialPosition& position, const std::vector<float>& frequency) {
    return write_angles(write_angles(out, position.x, frequency), position.y, frequency);
}

int64_t rotated_dim(int64_t head_dim, const std::vector<int32_t>&) { return head_dim; }
int64_t rotated_dim(int64_t head_dim, const std::vector<AxialPosition>&) { return head_dim / 2; }

template <typename Position>
void write_table(ggml_tensor* tensor, const std::vector<Position>& positions, const Rope& rope) {
    const int64_t head_dim = tensor->ne[0];
    const std::vector<float> frequency = frequencies(rope, rotated_dim(head_dim, positions));
    const bool on_host = ggml_backend_buffer_is_host(tensor->buffer);
    std::vector<float> values(on_host ? 0 : head_dim * positions.size());
    float* row = on_host ? static_cast<float*>(tensor->data) : values.data();
    for (const Position& position : positions) row = write_row(row, position, frequency);
    if (!on_host) ggml_backend_tensor_set(tensor, values.data(), 0, values.size() * sizeof(float));
}

}  // namespace

void RopeAngles::write(const std::vector<int32_t>& positions) const {
    for (const Table& table : tables_) write_table(table.tensor, positions, table.rope);
}

void RopeAngles::write(const std::vector<AxialPosition>& positions) const {
    for (const Table& table : tables_) write_table(table.tensor, positions, table.rope);
}

}  // namespace pydiffusion
