// Token ids from Python. This is the only place that checks them; the native functions behind trust their
// callers.
#pragma once

#include "bindings/bindings.h"
#include "util/error.h"

namespace pydiffusion {

// The ids as a vector; throws Error(argument) for one outside the vocabulary. where: " of eos", of the
// error's text. least: -1 where positions may have no token.
template <typename T>
std::vector<int32_t> checked_tokens(const T* ids, size_t n, int32_t n_vocab, const char* where = "",
                                    int32_t least = 0) {
    std::vector<int32_t> tokens(n);
    for (size_t i = 0; i < n; ++i) {
        const T id = ids[i];  // read once: another thread may write to a numpy array
        if (id < least || id >= n_vocab) {
            throw Error(ErrorKind::argument,
                        format("token %lld at position %zu%s is outside the vocabulary, 0 to %d",
                               static_cast<long long>(id), i, where, n_vocab - 1));
        }
        tokens[i] = static_cast<int32_t>(id);
    }
    return tokens;
}

template <typename T>
std::vector<int32_t> checked_tokens(const Array1<T>& ids, int32_t n_vocab, const char* where = "",
                                    int32_t least = 0) {
    return checked_tokens(ids.data(), ids.shape(0), n_vocab, where, least);
}

}  // namespace pydiffusion
