#include "sampler/philox.h"

#include <algorithm>

namespace pydiffusion {

Draw random_draw(uint64_t seed, uint32_t canvas, uint32_t step, uint32_t position, int32_t n_vocab) {
    uint32_t c[4] = {position, step, canvas, 0};
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
        const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(b),
                                  static_cast<uint32_t>(a >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(a)};
        std::copy(next, next + 4, c);
        key[0] += 0x9E3779B9;
        key[1] += 0xBB67AE85;
    }
    return {static_cast<float>(c[0] >> 8) * 0x1p-24f,
            static_cast<int32_t>((uint64_t{c[1]} * static_cast<uint64_t>(n_vocab)) >> 32)};
}

}  // namespace pydiffusion
