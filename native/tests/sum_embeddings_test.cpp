// The kernel that sums the embeddings of listed tokens, run by the emulation, against plain loops.
#include "ggml.h"
#include "step_kernels_runs.h"

namespace pydiffusion {
namespace testing {

namespace {

template <typename T>
T rounded(float x);
template <>
__half rounded(float x) {
    return __float2half(x);
}
template <>
cuda::Bfloat16 rounded(float x) {
    return cuda::bfloat16_of(x);
}

float value_of(__half x) { return __half2float(x); }
float value_of(cuda::Bfloat16 x) { return ggml_bf16_to_fp32({x.bits}); }

template <typename T>
std::vector<T> all_rounded(const std::vector<float>& values) {
    std::vector<T> result;
    for (const float x : values) result.push_back(rounded<T>(x));
    return result;
}

// An embedding whose rows are `stride` apart, and lists of its tokens.
template <typename T>
struct SumsOfEmbeddings {
    static constexpr int64_t n_vocab = 300;
    int64_t d, stride;
    std::vector<int32_t> n_kept = {0, 1, 8, INT32_MAX, 9, 255, 300, kMaxGathered};
    std::vector<T> embedding = all_rounded<T>(random_values((n_vocab - 1) * stride + d, 1));
    std::vector<float> weights = random_values(n_kept.size() * kMaxGathered, 2);
    std::vector<int32_t> tokens = std::vector<int32_t>(weights.size());

    // Where there is no list, what was there stays.
    std::vector<float> run(Order order) {
        for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i * 7 % n_vocab);
        std::vector<float> soft(n_kept.size() * d, 9.0f);
        const dim3 grid(static_cast<unsigned>((d + kGatherElements - 1) / kGatherElements),
                        static_cast<unsigned>(n_kept.size()));
        emulate(grid, kGatherWarps * kLanes, 0, order, [&] {
            sum_embeddings(soft.data(), embedding.data(), stride, d, n_kept.data(), tokens.data(),
                           weights.data(), 3.0f);
        });
        return soft;
    }

    std::vector<float> expected() const {
        std::vector<float> soft(n_kept.size() * d, 9.0f);
        for (size_t t = 0; t < n_kept.size(); ++t) {
            for (int64_t c = 0; c < d && n_kept[t] <= kMaxGathered; ++c) {
                float total = 0.0f;
                for (int warp = 0; warp < kGatherWarps; ++warp) {
                    float sum = 0.0f;
                    for (int32_t i = warp; i < n_kept[t]; i += kGatherWarps) {
                        const size_t at = t * kMaxGathered + i;
                        sum += weights[at] * value_of(embedding[tokens[at] * stride + c]);
                    }
                    total += sum;
                }
                soft[t * d + c] = 3.0f * total;
            }
        }
        return soft;
    }
};

}  // namespace

TEST_CASE_TEMPLATE("sum_embeddings: plain loops, bit by bit, in every order", T, __half, cuda::Bfloat16) {
    for (const int64_t d : {8, 256, 264, 600}) {
        for (const Order order : orders()) {
            CAPTURE(d);
            if (kDetectsRaces && d > 8) break;
            SumsOfEmbeddings<T> sums = {d, d + (d == 264 ? 8 : 0)};
            const std::vector<float> found = sums.run(order);
            CHECK(same(found, sums.expected()));
        }
    }
}

}  // namespace testing
}  // namespace pydiffusion
