// Messages, quoting, the question for memory, aligned buffers.
#include <cstdint>

#include "support.h"
#include "util/aligned_buffer.h"

namespace pydiffusion {
namespace testing {

TEST_CASE("format") {
    CHECK(format("plain") == "plain");
    CHECK(format("%s has %d of %.2f", "x", -3, 0.5) == "x has -3 of 0.50");
    CHECK(format("%s", "") == "");
    CHECK(format("<%s>", std::string(100000, 'a').c_str()).size() == 100002);
}

TEST_CASE("names from a file are quoted: printable ASCII, 80 characters") {
    CHECK(quoted("blk.0.attn_q.weight") == "'blk.0.attn_q.weight'");
    CHECK(quoted("") == "''");
    CHECK(quoted("a\nb\x7f\xc3\xa9") == "'a\\x0ab\\x7f\\xc3\\xa9'");
    CHECK(quoted(std::string("a\0b", 3)) == "'a\\x00b'");
    CHECK(quoted("\033[31m") == "'\\x1b[31m'");  // no colours on a terminal
    CHECK(quoted(std::string(80, 'a')) == "'" + std::string(80, 'a') + "'");
    CHECK(quoted(std::string(81, 'a')) == "'" + std::string(80, 'a') + "...'");
}

TEST_CASE("an error has its kind") {
    const Error error = error_of([] { throw Error(ErrorKind::unsupported, "no"); });
    CHECK(error.kind() == ErrorKind::unsupported);
    CHECK(std::string(error.what()) == "no");
}

#if !defined(_WIN32)
TEST_CASE("memory is asked for beforehand") {
    require_memory(size_t{1} << 20);
    CHECK_ERROR(require_memory(size_t{1} << 62), out_of_memory, "memory");
}
#endif

TEST_CASE("buffers begin with a cache line") {
    for (const int64_t n : {1, 31, 32, 33, 1000}) {
        const auto buffer = gemm::allocate<uint16_t>(n);
        CHECK(reinterpret_cast<uintptr_t>(buffer.get()) % 64 == 0);
        std::fill_n(buffer.get(), n, uint16_t{1});
    }
    alignas(64) char bytes[256];
    CHECK(gemm::align(bytes) == bytes);
    CHECK(gemm::align(bytes + 1) == bytes + 64);
    CHECK(gemm::align(bytes + 64) == bytes + 64);
    CHECK(gemm::align(bytes + 127) == bytes + 128);
}

}  // namespace testing
}  // namespace pydiffusion
