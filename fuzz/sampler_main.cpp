// The sampler on edge-case rows, for valgrind: finds reads past the end of a row and branches on
// uninitialized memory, which ASan and UBSan do not detect.
//   valgrind --error-exitcode=9 --leak-check=full build/fuzz/check_sampler
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>

#include "sampler/entropy_bound.h"
#include "sampler/logits.h"
#include "sampler/philox.h"

namespace {

void require(bool ok, const char* what) {
    if (ok) return;
    std::fprintf(stderr, "FAILED: %s\n", what);
    std::exit(1);
}

// A heap block of exactly n floats, so that valgrind sees reads past the end.
std::unique_ptr<float[]> make_row(uint64_t seed, int64_t n, int kind) {
    constexpr float kInf = std::numeric_limits<float>::infinity();
    std::unique_ptr<float[]> row(new float[n]);
    for (int64_t i = 0; i < n; ++i)
        row[i] = (pydiffusion::random_draw(seed, 0, kind, static_cast<uint32_t>(i), 7).u - 0.5f) * 60.0f;
    const int64_t at = pydiffusion::random_draw(seed, 1, kind, 0, static_cast<int32_t>(n)).token;
    switch (kind) {
        case 1:
            row[at] = std::nanf("");
            break;
        case 2:
            row[at] = kInf;
            break;
        case 3:
            for (int64_t i = 0; i < n; ++i) row[i] = i == at ? 30.0f : -kInf;
            break;
        case 4:
            for (int64_t i = 0; i < n; ++i) row[i] = -kInf;
            break;
        case 5:
            for (int64_t i = 0; i < n; ++i) row[i] = 1e-42f;
            break;
        case 6:
            row[at] = std::numeric_limits<float>::max();
            break;
        default:
            break;
    }
    return row;
}

bool in_range(int32_t token, int64_t n) { return token >= 0 && token < n; }

void check_row(uint64_t seed, int64_t n, int kind, float temperature) {
    const float u = pydiffusion::random_draw(seed, 2, kind, 0, 7).u;
    const auto row = make_row(seed, n, kind);
    const pydiffusion::Measure plain = pydiffusion::measure_row(row.get(), n, temperature, u);
    require(in_range(plain.argmax, n) && in_range(plain.sampled, n), "measure_row");
    require(std::isnan(plain.entropy) || plain.entropy >= 0.0f, "entropy");
    const int32_t k = static_cast<int32_t>(std::min<int64_t>(n, 48));
    std::unique_ptr<int32_t[]> tokens(new int32_t[k]);
    pydiffusion::top_k(row.get(), n, k, tokens.get());
    for (int32_t i = 0; i < k; ++i) require(in_range(tokens[i], n), "top_k");
    auto capped = make_row(seed, n, kind);
    const pydiffusion::Measure m = pydiffusion::cap_and_measure_row(capped.get(), n, 30.0f, temperature, u);
    require(in_range(m.argmax, n) && in_range(m.sampled, n), "cap_and_measure_row");
    auto weights = make_row(seed, n, kind);
    pydiffusion::softmax_row(weights.get(), n, temperature);
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) sum += weights[i];
    require(kind != 0 || std::fabs(sum - 1.0) < 1e-3, "softmax_row");
}

void check_accept(uint64_t seed, size_t n) {
    std::unique_ptr<float[]> entropy(new float[n]);
    for (size_t i = 0; i < n; ++i) {
        const auto draw = pydiffusion::random_draw(seed, 3, 0, static_cast<uint32_t>(i), 9);
        entropy[i] = draw.token == 0 ? std::nanf("") : draw.token == 1 ? 0.0f : draw.u * 3.0f;
    }
    size_t n_accepted = 0;
    for (const uint8_t flag : pydiffusion::accept(entropy.get(), n, 0.1f)) n_accepted += flag;
    require(n_accepted <= n, "accept");
}

}  // namespace

int main() {
    size_t n_rows = 0;
    for (uint64_t seed = 0; seed < 4; ++seed) {
        for (const int64_t n : {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 255, 257, 1000, 4099}) {
            for (int kind = 0; kind <= 6; ++kind) {
                for (const float temperature : {1e-45f, 1e-3f, 0.4f, 1.0f, 1e6f}) {
                    check_row(seed, n, kind, temperature);
                    ++n_rows;
                }
            }
        }
        for (size_t n = 0; n < 70; ++n) check_accept(seed, n);
    }
    std::printf("%zu rows\n", n_rows);
}
