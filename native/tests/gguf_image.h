// GGUF files written by hand: the format's own layout, without any of the code that reads it.
//   "GGUF", u32 version, u64 number of tensors, u64 number of keys,
//   per key: string, u32 value type, value; per tensor: string, u32 n_dims, u64 dims[], u32 type, u64 offset,
//   zeros up to a multiple of the alignment, the data. Strings: u64 length, bytes. Little-endian throughout.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

namespace pydiffusion {
namespace testing {

class Bytes {
  public:
    Bytes& u8(uint8_t value) { return number(value, 1); }
    Bytes& u16(uint16_t value) { return number(value, 2); }
    Bytes& u32(uint32_t value) { return number(value, 4); }
    Bytes& u64(uint64_t value) { return number(value, 8); }
    Bytes& f32(float value) {
        uint32_t bits;
        static_assert(sizeof bits == sizeof value, "IEEE 754");
        std::memcpy(&bits, &value, sizeof bits);
        return u32(bits);
    }
    Bytes& f64(double value) {
        uint64_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        return u64(bits);
    }
    Bytes& characters(const std::string& text) {
        bytes_.insert(bytes_.end(), text.begin(), text.end());
        return *this;
    }
    Bytes& text(const std::string& text) { return u64(text.size()).characters(text); }
    Bytes& append(const Bytes& other) {
        bytes_.insert(bytes_.end(), other.bytes_.begin(), other.bytes_.end());
        return *this;
    }
    Bytes& zeros(uint64_t n) {
        bytes_.resize(bytes_.size() + n);
        return *this;
    }

    uint64_t size() const { return bytes_.size(); }
    const std::vector<uint8_t>& get() const { return bytes_; }

  private:
    Bytes& number(uint64_t value, int n_bytes) {
        for (int i = 0; i < n_bytes; ++i) bytes_.push_back(static_cast<uint8_t>(value >> 8 * i));
        return *this;
    }

    std::vector<uint8_t> bytes_;
};

// The value types' numbers in a file.
enum : uint32_t { U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 };

// A file; what the tests break is public.
struct GgufImage {
    std::string magic = "GGUF";
    uint32_t version = 3;
    uint64_t alignment = 32;                    // of the data; its key is up to the test
    std::optional<uint64_t> n_tensors, n_keys;  // in the header, where it isn't the truth
    std::vector<Bytes> keys, tensors;
    Bytes data;

    GgufImage& key(const std::string& name, uint32_t type, const Bytes& value) {
        keys.push_back(Bytes().text(name).u32(type).append(value));
        return *this;
    }
    GgufImage& key(const std::string& name, uint32_t value) { return key(name, U32, Bytes().u32(value)); }
    GgufImage& key(const std::string& name, float value) { return key(name, F32, Bytes().f32(value)); }
    GgufImage& key(const std::string& name, const std::string& value) {
        return key(name, STRING, Bytes().text(value));
    }
    GgufImage& array(const std::string& name, uint32_t type, uint64_t length, const Bytes& elements) {
        return key(name, ARRAY, Bytes().u32(type).u64(length).append(elements));
    }
    GgufImage& tensor(const std::string& name, const std::vector<uint64_t>& dims, uint32_t type,
                      uint64_t offset) {
        tensors.push_back(Bytes().text(name).u32(static_cast<uint32_t>(dims.size())));
        for (const uint64_t dim : dims) tensors.back().u64(dim);
        tensors.back().u32(type).u64(offset);
        return *this;
    }
    // Behind the data so far, at the next multiple of the alignment, with zeros for its data.
    GgufImage& tensor_at_end(const std::string& name, const std::vector<uint64_t>& dims, uint32_t type,
                             uint64_t n_bytes) {
        data.zeros((alignment - data.size() % alignment) % alignment);
        tensor(name, dims, type, data.size());
        data.zeros(n_bytes);
        return *this;
    }

    Bytes header() const {
        Bytes bytes;
        bytes.characters(magic).u32(version);
        bytes.u64(n_tensors.value_or(tensors.size())).u64(n_keys.value_or(keys.size()));
        for (const Bytes& one : keys) bytes.append(one);
        for (const Bytes& one : tensors) bytes.append(one);
        return bytes;
    }
    std::vector<uint8_t> bytes() const {
        Bytes bytes = header();
        bytes.zeros((alignment - bytes.size() % alignment) % alignment);
        return bytes.append(data).get();
    }
};

}  // namespace testing
}  // namespace pydiffusion
