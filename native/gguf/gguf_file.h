// GGUF reader: maps a file and validates all of it before any use. Architecture-independent.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "ggml.h"

namespace pydiffusion {

// Read-only memory mapping of a whole file; unmapped by the destructor.
class Mapping {
  public:
    Mapping() = default;  // of no file
    explicit Mapping(const std::string& path);
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    const uint8_t* data() const { return data_; }
    uint64_t size() const { return size_; }

    // Whether the file is now shorter than the mapping: reading beyond its end raises SIGBUS.
    bool truncated() const;

  private:
    const uint8_t* data_ = nullptr;
    uint64_t size_ = 0;
    void* handle_ = nullptr;  // Windows: the mapping object
    int file_ = -1;           // elsewhere: kept open to check the file's size
};

// GGUF's value types, numbered as in the format.
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

// Integers are widened to 64 bits and floats to double; Value::type keeps the type in the file.
using Scalar = std::variant<bool, int64_t, uint64_t, double, std::string>;

struct Value {
    ValueType type;  // for an array, that of its elements
    bool is_array = false;
    Scalar scalar;  // if not an array
    // If an array, one of these holds its elements; booleans are in `integers`.
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
    uint64_t offset;          // from the start of the file (of its part if split)
    uint64_t n_bytes;
    size_t part = 0;  // 0-based part of a split file

    int64_t dimension(size_t i) const { return i < ne.size() ? ne[i] : 1; }
    uint64_t n_elements() const;
    std::string shape() const;  // "[256, 512]"
};

class GgufFile {
  public:
    // Throws Error(format) that says what is wrong and at which byte.
    explicit GgufFile(const std::string& path);

    // Opens a file, or all parts of a split file given its first part; keys and tensors are then those of the
    // original file. Validates each part and that the parts belong together.
    static std::shared_ptr<GgufFile> open_all_parts(const std::string& path);

    // A file of which only the header exists, as bytes: keys and tensors are validated, but there is no data
    // to read. For the sizes of a file that is not written yet; `name` is for errors.
    static std::shared_ptr<GgufFile> from_header(const uint8_t* header, uint64_t n_bytes,
                                                 const std::string& name);

    // These describe this file, or the first part only; each part has its own.
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
    // The kind of a GGUF without a model, and what to do with it; empty for a model.
    std::string other_kind() const;
    // Throws Error(format) if a part was truncated since it was opened.
    void require_not_truncated() const;
    const uint8_t* tensor_data(const TensorInfo& tensor) const {
        return part(tensor.part).data() + tensor.offset;
    }

  private:
    class Reader;
    GgufFile() = default;
    // file_size: bytes that the header may refer to.
    void read(Reader& reader, uint64_t file_size);
    void read_header(Reader& reader);
    void read_metadata(Reader& reader);
    void read_tensors(Reader& reader, uint64_t file_size);
    void resolve_tensor_offsets(uint64_t end_of_infos, uint64_t size);
    void append(std::unique_ptr<const GgufFile> part);

    std::string path_;
    Mapping mapping_;
    uint32_t version_ = 0;
    uint64_t n_keys_ = 0;
    uint64_t n_tensors_ = 0;
    uint64_t alignment_ = 32;
    uint64_t data_offset_ = 0;
    std::vector<std::string> keys_;
    std::map<std::string, Value> values_;  // ordered: hostile keys can't cause hash collisions
    std::vector<TensorInfo> tensors_;
    std::map<std::string, size_t> tensor_index_;
    std::vector<std::unique_ptr<const GgufFile>> later_parts_;
};

}  // namespace pydiffusion
