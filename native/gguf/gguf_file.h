// A GGUF file read from a memory mapping and fully validated before any use. Knows no architecture.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "ggml.h"

namespace pydiffusion {

// Read-only mapping of a whole file, closed with the object.
class Mapping {
  public:
    explicit Mapping(const std::string& path);
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    const uint8_t* data() const { return data_; }
    uint64_t size() const { return size_; }

    // Whether the file still has all the bytes that are mapped: reading one that is gone ends the process
    // with a bus error.
    bool whole() const;

  private:
    const uint8_t* data_ = nullptr;
    uint64_t size_ = 0;
    void* handle_ = nullptr;  // Windows only: the mapping object
    int file_ = -1;           // elsewhere: the file, kept open to watch its size
};

// The value types of GGUF, with the numbers that the format gives them.
enum class ValueType : uint32_t {
    u8 = 0,
    i8,
    u16,
    i16,
    u32,
    i32,
    f32,
    boolean,
    string,
    array,
    u64,
    i64,
    f64
};

const char* value_type_name(ValueType type);

// Integers widen to 64 bits and floats to double; `type` keeps what the file said.
using Scalar = std::variant<bool, int64_t, uint64_t, double, std::string>;

struct Value {
    ValueType type;  // of the value, or of an array's elements
    bool is_array = false;
    Scalar scalar;  // when not an array
    // An array: one of these by its type (integers and booleans, floats, strings).
    std::vector<int64_t> integers;
    std::vector<double> floats;
    std::vector<std::string> strings;

    size_t array_length() const;
    std::string type_name() const;  // "u32", "array[str]"
    bool operator==(const Value& other) const;
};

struct TensorInfo {
    std::string name;
    ggml_type type;
    std::vector<int64_t> ne;  // ggml's order, fastest first; 1 to 4 entries
    uint64_t offset;          // from the start of the file, or of its part
    uint64_t n_bytes;
    size_t part = 0;  // of a split file, counted from 0

    int64_t dimension(size_t i) const { return i < ne.size() ? ne[i] : 1; }
    uint64_t n_elements() const;
    std::string shape() const;  // "[256, 512]"
};

class GgufFile {
  public:
    // Throws Error(format) naming what is wrong and where; Error(unsupported) for what we know but can't
    // read.
    explicit GgufFile(const std::string& path);

    // A file; of a split one, whose first part must be given, all parts as one: keys and tensors are those of
    // the file that was split. Each part is validated, and that they belong together.
    static std::shared_ptr<GgufFile> open_all_parts(const std::string& path);

    // Of this file, or of the first part. Others have alignments, sizes and mappings of their own.
    const std::string& path() const { return path_; }
    uint32_t version() const { return version_; }
    uint64_t alignment() const { return alignment_; }
    uint64_t data_offset() const { return data_offset_; }
    uint64_t n_bytes() const { return mapping_.size(); }
    const uint8_t* data() const { return mapping_.data(); }

    size_t n_parts() const { return 1 + later_parts_.size(); }
    const GgufFile& part(size_t i) const { return i == 0 ? *this : *later_parts_[i - 1]; }
    uint64_t n_bytes_of_all_parts() const;

    const std::vector<std::string>& keys() const { return keys_; }  // in file order
    const Value* find(const std::string& key) const;
    const std::vector<TensorInfo>& tensors() const { return tensors_; }
    const TensorInfo* find_tensor(const std::string& name) const;
    // Throws Error(format) when a part was shortened since it was opened.
    void require_not_truncated() const;
    const uint8_t* tensor_data(const TensorInfo& tensor) const {
        return part(tensor.part).data() + tensor.offset;
    }

  private:
    class Reader;
    void read_header(Reader& reader);
    void read_metadata(Reader& reader);
    void read_tensors(Reader& reader);
    void place_tensors(uint64_t end_of_infos);
    void append(std::unique_ptr<const GgufFile> part);

    std::string path_;
    Mapping mapping_;
    uint32_t version_ = 0;
    uint64_t n_keys_ = 0;
    uint64_t n_tensors_ = 0;
    uint64_t alignment_ = 32;
    uint64_t data_offset_ = 0;
    std::vector<std::string> keys_;
    std::map<std::string, Value> values_;  // ordered: no file can choose keys that make it slow
    std::vector<TensorInfo> tensors_;
    std::map<std::string, size_t> tensor_index_;
    std::vector<std::unique_ptr<const GgufFile>> later_parts_;
};

}  // namespace pydiffusion
