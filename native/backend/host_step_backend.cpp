#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "backend/row_math.h"
#include "backend/step_backend.h"
#include "util/timer.h"

namespace pydiffusion {

namespace {

const float* row_of(const ggml_tensor* t, int64_t i) {
    return reinterpret_cast<const float*>(static_cast<const char*>(t->data) + i * t->nb[1]);
}

float* row_of(ggml_tensor* t, int64_t i) {
    return const_cast<float*>(row_of(static_cast<const ggml_tensor*>(t), i));
}

struct RowSums {
    std::vector<row::Sums> chunks;
    row::Sums all;  // the chunks' are relative to its maximum
};

RowSums sum_row(const float* x, int64_t n_vocab, float scale) {
    RowSums sums;
    for (int64_t begin = 0; begin < n_vocab; begin += row::kChunk) {
        const int64_t end = std::min(n_vocab, begin + row::kChunk);
        row::Sums chunk = {-std::numeric_limits<float>::infinity(), 0.0f, 0.0f};
        for (int64_t i = begin; i < end; ++i) chunk.maximum = std::fmax(chunk.maximum, x[i]);
        for (int64_t i = begin; i < end; ++i) row::add(chunk, x[i], scale);
        sums.chunks.push_back(chunk);
    }
    float maximum = -std::numeric_limits<float>::infinity();
    for (const row::Sums& chunk : sums.chunks) maximum = std::max(maximum, chunk.maximum);
    sums.all = {maximum, 0.0f, 0.0f};
    for (row::Sums& chunk : sums.chunks) {
        chunk = row::rescaled(chunk, maximum, scale);
        sums.all.weight += chunk.weight;
        sums.all.weighted += chunk.weighted;
    }
    return sums;
}

int32_t draw(const float* x, int64_t n_vocab, const RowSums& sums, float scale, float u) {
    double target = std::max(static_cast<double>(u), 0x1p-25) * sums.all.weight;
    int64_t chosen = -1;  // the last chunk with mass, if rounding leaves none
    for (int64_t c = 0; c < static_cast<int64_t>(sums.chunks.size()); ++c) {
        if (!(sums.chunks[c].weight > 0.0f)) continue;
        if (chosen >= 0) target -= sums.chunks[chosen].weight;
        chosen = c;
        if (target < sums.chunks[c].weight) break;
    }
    const int64_t begin = chosen * row::kChunk, end = std::min(n_vocab, begin + row::kChunk);
    int64_t last = begin;
    for (int64_t i = begin; i < end; ++i) {
        const float weight = row::power(row::exponent(x[i], sums.all.maximum, scale));
        if (!(weight > 0.0f)) continue;
        last = i;
        target -= weight;
        if (target < 0.0) break;
    }
    return static_cast<int32_t>(last);
}

Measure measure(const float* x, int64_t n_vocab, float temperature, float u) {
    const float scale = row::scale_of(temperature);
    const RowSums sums = sum_row(x, n_vocab, scale);
    if (!row::is_valid(sums.all)) return {0, 0, std::numeric_limits<float>::quiet_NaN()};
    const auto argmax = static_cast<int32_t>(std::find(x, x + n_vocab, sums.all.maximum) - x);
    return {argmax, draw(x, n_vocab, sums, scale, u), row::entropy(sums.all)};
}

row::Distribution distribution(const float* x, int64_t n_vocab, float temperature, float dropped_mass) {
    const float scale = row::scale_of(temperature);
    row::Distribution d = row::distribution_of(sum_row(x, n_vocab, scale).all, scale);
    double below[row::kThresholds] = {};
    for (int64_t i = 0; i < n_vocab; ++i) {
        const float p = row::probability(d, x[i]);
        for (int j = 0; j < row::kThresholds; ++j) below[j] += p >= row::threshold(j) ? 0.0f : p;
    }
    int chosen = 0;
    while (!row::may_choose(chosen, below[chosen], dropped_mass)) ++chosen;
    d.threshold = row::threshold(chosen);
    return d;
}

class HostStepBackend : public StepBackend {
  public:
    void condition(const ggml_tensor* logits, const ggml_tensor* embedding, ggml_tensor* soft, int64_t n,
                   const StepState& state) override {
        const int64_t n_vocab = logits->ne[0], d = soft->ne[0];
        std::vector<float> embedded(d);
        for (int64_t t = 0; t < n; ++t) {
            float* out = row_of(soft, t);
            std::fill_n(out, d, 0.0f);
            if (!state.self_conditioning) continue;
            const float* x = row_of(logits, t);
            const row::Distribution dist =
                distribution(x, n_vocab, state.previous_temperature, state.dropped_mass);
            for (int64_t v = 0; v < n_vocab; ++v) {
                const float p = row::probability(dist, x[v]);
                if (p == 0.0f) continue;
                embed(embedding, v, embedded.data());
                for (int64_t i = 0; i < d; ++i) out[i] += p * embedded[i];
            }
            for (int64_t i = 0; i < d; ++i) out[i] *= state.embedding_scale;
        }
    }

    void measure(ggml_tensor* logits, int64_t n, StepState& state) override {
        const int64_t n_vocab = logits->ne[0];
        const row::SoftCap cap = row::soft_cap(state.soft_cap);
        for (int64_t t = 0; t < n; ++t) {
            float* x = row_of(logits, t);
            for (int64_t i = 0; i < n_vocab; ++i) x[i] = cap(x[i]);
            state.measures[t] = pydiffusion::measure(x, n_vocab, state.temperature, state.u[t]);
        }
    }

    void pin(ggml_tensor* logits, int64_t position, int32_t token, float value, const StepState&) override {
        float* x = row_of(logits, position);
        std::fill_n(x, logits->ne[0], -std::numeric_limits<float>::infinity());
        x[token] = value;
    }

    double seconds_of(const std::function<void()>& work) override { return pydiffusion::seconds_of(work); }

    double copy_rate() override {
        const std::vector<char> source(size_t{64} << 20, 1);
        std::vector<char> target(source.size());
        const double seconds =
            best_seconds([&] { std::memcpy(target.data(), source.data(), source.size()); });
        return 2.0 * static_cast<double>(source.size()) / seconds;
    }

  private:
    static void embed(const ggml_tensor* embedding, int64_t v, float* out) {
        const char* source = static_cast<const char*>(embedding->data) + v * embedding->nb[1];
        if (const ggml_to_float_t to_float = ggml_get_type_traits(embedding->type)->to_float) {
            to_float(source, out, embedding->ne[0]);
        } else {
            std::copy_n(reinterpret_cast<const float*>(source), embedding->ne[0], out);
        }
    }
};

}  // namespace

int64_t n_sums(int64_t n_vocab) {
    return row::n_chunks_of(n_vocab) * static_cast<int64_t>(sizeof(row::Sums) / sizeof(float));
}

std::unique_ptr<StepBackend> make_host_step_backend(ggml_backend_t) {
    return std::make_unique<HostStepBackend>();
}

}  // namespace pydiffusion
