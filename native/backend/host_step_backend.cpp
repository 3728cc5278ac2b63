#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "backend/row_math.h"
#include "backend/step_backend.h"
#include "util/timer.h"

namespace pydiffusion {

namespace {

using row::kLanes;
using row::kWarps;

const float* row_of(const ggml_tensor* t, int64_t i) {
    return reinterpret_cast<const float*>(static_cast<const char*>(t->data) + i * t->nb[1]);
}

float* row_of(ggml_tensor* t, int64_t i) {
    return const_cast<float*>(row_of(static_cast<const ggml_tensor*>(t), i));
}

template <typename Action>
void for_each_of_lane(int warp, int lane, int64_t n_vocab, const Action& action) {
    const row::Range range = row::range_of(warp, n_vocab);
    for (int64_t i = range.begin + lane; i < range.end; i += kLanes) action(i);
}

struct RowSums {
    row::Sums warps[kWarps];
    row::Sums all;
};

RowSums sum_row(const float* x, int64_t n_vocab, float inverse) {
    RowSums sums;
    sums.all = row::empty_sums();
    for (int warp = 0; warp < kWarps; ++warp) {
        row::Sums warp_sums = row::empty_sums();
        for (int lane = 0; lane < kLanes; ++lane) {
            row::Sums lane_sums = row::empty_sums();
            for_each_of_lane(warp, lane, n_vocab,
                             [&](int64_t i) { row::add(lane_sums, x[i], static_cast<int32_t>(i), inverse); });
            warp_sums = row::merged(warp_sums, lane_sums, inverse);
        }
        sums.warps[warp] = warp_sums;
        sums.all = row::merged(sums.all, warp_sums, inverse);
    }
    return sums;
}

int32_t draw(const float* x, int64_t n_vocab, const RowSums& sums, float inverse, float u) {
    const float maximum = sums.all.maximum;
    double target = std::max(static_cast<double>(u), 0x1p-25) * sums.all.weight;
    int warp = 0;
    for (; warp + 1 < kWarps; ++warp) {
        row::Sums warp_sums = sums.warps[warp];
        if (warp_sums.argmax < 0) continue;
        row::rescale(warp_sums, maximum, inverse);
        if (target < warp_sums.weight) break;
        target -= warp_sums.weight;
    }
    const row::Range range = row::range_of(warp, n_vocab);
    int32_t last = sums.all.argmax;
    for (int64_t i = range.begin; i < range.end; ++i) {
        if (!(x[i] >= -FLT_MAX)) continue;
        last = static_cast<int32_t>(i);
        target -= expf(row::scaled(x[i], maximum, inverse));
        if (target < 0.0) break;
    }
    return last;
}

Measure measure(const float* x, int64_t n_vocab, float temperature, float u) {
    const float inverse = row::inverse_temperature(temperature);
    const RowSums sums = sum_row(x, n_vocab, inverse);
    if (sums.all.has_nonfinite || sums.all.argmax < 0) return {0, 0, std::numeric_limits<float>::quiet_NaN()};
    const float entropy = std::log(sums.all.weight) - sums.all.weighted / sums.all.weight;
    return {sums.all.argmax, draw(x, n_vocab, sums, inverse, u), std::max(0.0f, entropy)};
}

void distribution(const float* x, int64_t n_vocab, float temperature, float dropped_mass,
                  row::Distribution& d) {
    d.inverse = row::inverse_temperature(temperature);
    const row::Sums sums = sum_row(x, n_vocab, d.inverse).all;
    d.maximum = sums.maximum;
    d.threshold = 0.0f;
    d.scale =
        sums.has_nonfinite || sums.argmax < 0 ? std::numeric_limits<float>::quiet_NaN() : 1.0f / sums.weight;
    double below[row::kThresholds] = {};
    for (int thread = 0; thread < row::kThreads; ++thread) {
        row::Tails tails = {};
        for_each_of_lane(thread / kLanes, thread % kLanes, n_vocab,
                         [&](int64_t i) { row::add(tails, row::probability(d, x[i])); });
        for (int i = 0; i < row::kThresholds; ++i) below[i] += tails.below[i];
    }
    d.threshold = row::threshold(row::choose_threshold(below, dropped_mass));
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
            row::Distribution dist;
            distribution(x, n_vocab, state.previous_temperature, state.dropped_mass, dist);
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
        for (int64_t t = 0; t < n; ++t) {
            float* x = row_of(logits, t);
            for (int64_t i = 0; i < n_vocab; ++i) x[i] = row::capped(x[i], state.soft_cap);
            state.measures[t] = pydiffusion::measure(x, n_vocab, state.temperature, state.u[t]);
        }
    }

    void pin(ggml_tensor* logits, int64_t position, int32_t token, float value) override {
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

std::unique_ptr<StepBackend> make_host_step_backend(ggml_backend_t) {
    return std::make_unique<HostStepBackend>();
}

}  // namespace pydiffusion
