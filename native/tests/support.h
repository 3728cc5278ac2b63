// What several tests need: errors with their kind and message, folders that vanish, random numbers.
#pragma once

#include <doctest/doctest.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "util/error.h"

// How doctest prints what differs.
namespace doctest {

template <typename T>
struct StringMaker<std::vector<T>> {
    static String convert(const std::vector<T>& values) {
        String text = "{";
        for (size_t i = 0; i < values.size() && i < 32; ++i) text += (i ? ", " : "") + toString(values[i]);
        return text + (values.size() > 32 ? ", ...}" : "}");
    }
};

}  // namespace doctest

namespace pydiffusion {
namespace testing {

// The Error that `work` throws; anything else fails the test.
template <typename Work>
Error error_of(const Work& work) {
    try {
        work();
    } catch (const Error& error) {
        return error;
    }
    FAIL("no error was thrown");
    throw 0;  // never reached: FAIL throws
}

// Checks that an expression throws an Error of this kind, with these words in its message.
#define CHECK_ERROR(expression, kind_of_error, words)                                                     \
    do {                                                                                                  \
        const ::pydiffusion::Error error = ::pydiffusion::testing::error_of([&] { (void)(expression); }); \
        const std::string message = error.what();                                                         \
        const bool has_kind = error.kind() == ::pydiffusion::ErrorKind::kind_of_error;                    \
        const bool has_words = message.find(words) != std::string::npos;                                  \
        CHECK_MESSAGE(has_kind, message);                                                                 \
        CHECK_MESSAGE(has_words, message, " should contain: ", words);                                    \
    } while (false)

// A new folder, removed with all that is in it.
class TemporaryFolder {
  public:
    TemporaryFolder() {
        std::random_device random;
        do {
            path_ = std::filesystem::temp_directory_path() / format("pydiffusion-tests-%08x", random());
        } while (!std::filesystem::create_directory(path_));
    }
    ~TemporaryFolder() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }
    TemporaryFolder(const TemporaryFolder&) = delete;
    TemporaryFolder& operator=(const TemporaryFolder&) = delete;

    std::string path() const { return path_.string(); }
    std::string write(const std::string& name, const std::vector<uint8_t>& bytes) const {
        const std::string path = (path_ / name).string();
        std::ofstream file(path, std::ios::binary | std::ios::trunc);
        file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
        file.close();
        REQUIRE_MESSAGE(file.good(), path, " can't be written");
        return path;
    }

  private:
    std::filesystem::path path_;
};

// Normally distributed, the same on every machine: sums of uniforms, for std::normal_distribution is the
// library's own.
inline std::vector<float> random_values(size_t n, uint32_t seed, float scale = 1.0f) {
    std::mt19937 generator(seed);
    std::vector<float> values(n);
    for (float& value : values) {
        double sum = -6.0;
        for (int i = 0; i < 12; ++i) sum += static_cast<double>(generator()) * 0x1p-32;
        value = scale * static_cast<float>(sum);
    }
    return values;
}

}  // namespace testing
}  // namespace pydiffusion
