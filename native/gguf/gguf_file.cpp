#include "gguf/gguf_file.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>

#include "util/error.h"

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace pydiffusion {

namespace {

[[noreturn]] void fail(const std::string& path, const std::string& what) {
    throw Error(ErrorKind::format, path + ": " + what);
}

constexpr uint32_t kMagic = 0x46554747;  // "GGUF" read as a little-endian number
// The system would cut the path at a NUL and open another file.
const std::string& require_no_nul(const std::string& path) {
    if (path.find('\0') != std::string::npos)
        throw Error(ErrorKind::argument, quoted(path) + " contains a NUL byte: not a valid path");
    return path;
}

constexpr uint64_t kMaxName = 65535;  // bytes of a key's or tensor's name; ggml allows 63 for tensors

}  // namespace

// --- mapping ---

#if defined(_WIN32)

Mapping::Mapping(const std::string& path) {
    HANDLE file =
        CreateFileA(path.c_str(), GENERIC_READ, FILE_SHARE_READ, nullptr, OPEN_EXISTING, 0, nullptr);
    if (file == INVALID_HANDLE_VALUE) fail(path, "can't be opened");
    LARGE_INTEGER size;
    GetFileSizeEx(file, &size);
    size_ = static_cast<uint64_t>(size.QuadPart);
    if (size_ == 0) {
        CloseHandle(file);
        fail(path, "is empty: not a GGUF file");
    }
    handle_ = CreateFileMappingA(file, nullptr, PAGE_READONLY, 0, 0, nullptr);
    CloseHandle(file);
    data_ = handle_ ? static_cast<const uint8_t*>(MapViewOfFile(handle_, FILE_MAP_READ, 0, 0, 0)) : nullptr;
    if (!data_) fail(path, "can't be mapped into memory");
}

Mapping::~Mapping() {
    if (data_) UnmapViewOfFile(data_);
    if (handle_) CloseHandle(handle_);
}

bool Mapping::truncated() const { return false; }  // Windows refuses to truncate a mapped file

#else

Mapping::Mapping(const std::string& path) {
    // O_NONBLOCK: opening a pipe without a writer would block. It has no effect on regular files.
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0) fail(path, std::string("can't be opened: ") + std::strerror(errno));
    struct stat status;
    if (fstat(file, &status) != 0 || !S_ISREG(status.st_mode)) {
        close(file);
        fail(path, "is not a regular file");
    }
    size_ = static_cast<uint64_t>(status.st_size);
    if (size_ == 0) {
        close(file);
        fail(path, "is empty: not a GGUF file");
    }
    void* address = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file, 0);
    if (address == MAP_FAILED) {
        const int error = errno;
        close(file);
        if (error == ENOMEM)
            throw Error(ErrorKind::out_of_memory,
                        path + format(": out of memory: failed to map %.1f MB (no address space remaining)",
                                      static_cast<double>(size_) / 1e6));
        fail(path, std::string("can't be mapped into memory: ") + std::strerror(error));
    }
    file_ = file;
    data_ = static_cast<const uint8_t*>(address);
}

Mapping::~Mapping() {
    if (data_) munmap(const_cast<uint8_t*>(data_), size_);
    if (file_ >= 0) close(file_);
}

bool Mapping::truncated() const {
    struct stat status;
    return fstat(file_, &status) == 0 && static_cast<uint64_t>(status.st_size) < size_;
}

#endif

// --- values ---

const char* value_type_name(ValueType type) {
    static const char* const names[] = {"u8",   "i8",  "u16",   "i16", "u32", "i32", "f32",
                                        "bool", "str", "array", "u64", "i64", "f64"};
    return names[static_cast<uint32_t>(type)];
}

size_t Value::array_length() const { return std::max({integers.size(), floats.size(), strings.size()}); }

std::string Value::type_name() const {
    return is_array ? format("array[%s]", value_type_name(type)) : value_type_name(type);
}

bool Value::operator==(const Value& other) const {
    return type == other.type && is_array == other.is_array && scalar == other.scalar &&
           integers == other.integers && floats == other.floats && strings == other.strings;
}

uint64_t TensorInfo::n_elements() const {
    uint64_t n = 1;
    for (const int64_t dimension : ne) n *= static_cast<uint64_t>(dimension);
    return n;
}

std::string TensorInfo::shape() const {
    std::string text = "[";
    for (size_t i = 0; i < ne.size(); ++i) {
        text += format(i ? ", %lld" : "%lld", static_cast<long long>(ne[i]));
    }
    return text + "]";
}

// --- reader: checks every read against the end of the file ---

class GgufFile::Reader {
  public:
    Reader(const std::string& path, const uint8_t* data, uint64_t size)
        : path_(path), data_(data), size_(size) {}

    uint64_t position() const { return position_; }
    uint64_t remaining() const { return size_ - position_; }

    [[noreturn]] void fail_here(const std::string& what) const {
        fail(path_,
             format("%s (at byte %llu of %llu)", what.c_str(), static_cast<unsigned long long>(position_),
                    static_cast<unsigned long long>(size_)));
    }

    template <typename T>
    T read(const std::string& what) {
        if (remaining() < sizeof(T)) fail_here("ends inside " + what);
        T value;
        std::memcpy(&value, data_ + position_, sizeof(T));
        position_ += sizeof(T);
        return value;
    }

    std::string read_string(const std::string& what, uint64_t limit = std::numeric_limits<uint64_t>::max()) {
        const uint64_t length = read<uint64_t>("the length of " + what);
        if (length > remaining()) fail_here(what + " runs past the end of the file");
        if (length > limit)
            fail_here(
                format("%s is longer than %llu bytes", what.c_str(), static_cast<unsigned long long>(limit)));
        std::string text(reinterpret_cast<const char*>(data_ + position_), length);
        position_ += length;
        return text;
    }

    Scalar read_scalar(ValueType type, const std::string& what) {
        switch (type) {
            case ValueType::u8:
                return static_cast<uint64_t>(read<uint8_t>(what));
            case ValueType::i8:
                return static_cast<int64_t>(read<int8_t>(what));
            case ValueType::u16:
                return static_cast<uint64_t>(read<uint16_t>(what));
            case ValueType::i16:
                return static_cast<int64_t>(read<int16_t>(what));
            case ValueType::u32:
                return static_cast<uint64_t>(read<uint32_t>(what));
            case ValueType::i32:
                return static_cast<int64_t>(read<int32_t>(what));
            case ValueType::u64:
                return read<uint64_t>(what);
            case ValueType::i64:
                return read<int64_t>(what);
            case ValueType::f32:
                return static_cast<double>(read<float>(what));
            case ValueType::f64:
                return read<double>(what);
            case ValueType::string:
                return read_string(what);
            case ValueType::boolean: {
                const uint8_t byte = read<uint8_t>(what);
                if (byte > 1)
                    fail_here(
                        format("%s is a boolean with the value %u; expected 0 or 1", what.c_str(), byte));
                return byte == 1;
            }
            case ValueType::array:
                break;
        }
        fail_here(what + " is a nested array: not supported");
    }

    ValueType read_type(const std::string& what) {
        const uint32_t number = read<uint32_t>("the type of " + what);
        if (number > static_cast<uint32_t>(ValueType::f64)) {
            fail_here(format("%s has the unknown value type %u", what.c_str(), number));
        }
        return static_cast<ValueType>(number);
    }

    Value read_value(const std::string& what) {
        Value value;
        value.type = read_type(what);
        if (value.type != ValueType::array) {
            value.scalar = read_scalar(value.type, what);
            return value;
        }
        value.is_array = true;
        value.type = read_type(what + "'s elements");
        const uint64_t length = read<uint64_t>("the length of " + what);
        // Refuse a length that can't fit before allocating for it.
        if (length > remaining() / min_size(value.type)) fail_here(what + " runs past the end of the file");
        reserve(value, length);
        for (uint64_t i = 0; i < length; ++i) append(value, read_scalar(value.type, what));
        return value;
    }

  private:
    static uint64_t min_size(ValueType type) {
        static const uint64_t sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8};
        return sizes[static_cast<uint32_t>(type)];
    }

    static void reserve(Value& value, uint64_t length) {
        if (value.type == ValueType::string) {
            value.strings.reserve(length);
        } else if (value.type == ValueType::f32 || value.type == ValueType::f64) {
            value.floats.reserve(length);
        } else {
            value.integers.reserve(length);
        }
    }

    void append(Value& value, Scalar&& element) {
        if (auto* text = std::get_if<std::string>(&element)) {
            value.strings.push_back(std::move(*text));
        } else if (const auto* number = std::get_if<double>(&element)) {
            value.floats.push_back(*number);
        } else if (const auto* flag = std::get_if<bool>(&element)) {
            value.integers.push_back(*flag);
        } else if (const auto* integer = std::get_if<int64_t>(&element)) {
            value.integers.push_back(*integer);
        } else {
            const uint64_t integer64 = std::get<uint64_t>(element);
            if (integer64 > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
                fail_here("an array element is larger than 2^63 - 1");
            }
            value.integers.push_back(static_cast<int64_t>(integer64));
        }
    }

    const std::string& path_;
    const uint8_t* data_;
    uint64_t size_;
    uint64_t position_ = 0;
};

// --- file ---

GgufFile::GgufFile(const std::string& path) : path_(require_no_nul(path)), mapping_(path) {
    Reader reader(path_, mapping_.data(), mapping_.size());
    read(reader, mapping_.size());
}

std::shared_ptr<GgufFile> GgufFile::from_header(const uint8_t* header, uint64_t n_bytes,
                                                const std::string& name) {
    const std::shared_ptr<GgufFile> file(new GgufFile());  // the constructor is private
    file->path_ = name;
    Reader reader(file->path_, header, n_bytes);
    file->read(reader, std::numeric_limits<int64_t>::max());
    return file;
}

void GgufFile::read(Reader& reader, uint64_t file_size) {
    read_header(reader);
    read_metadata(reader);
    read_tensors(reader, file_size);
    resolve_tensor_offsets(reader.position(), file_size);
}

void GgufFile::read_header(Reader& reader) {
    const uint32_t magic = reader.read<uint32_t>("the magic number");
    if (magic != kMagic) fail(path_, "does not begin with 'GGUF': not a GGUF file");
    version_ = reader.read<uint32_t>("the version");
    if (version_ != 0 && (version_ & 0xffff) == 0)
        fail(path_, "is a big-endian GGUF file: only little-endian is supported");
    if (version_ != 2 && version_ != 3)
        fail(path_, format("has GGUF version %u; supported are 2 and 3", version_));
    n_tensors_ = reader.read<uint64_t>("the number of tensors");
    n_keys_ = reader.read<uint64_t>("the number of keys");
    // Minimum sizes: 32 bytes per tensor entry, 13 per key entry.
    if (n_tensors_ > reader.remaining() / 32)
        reader.fail_here("has a tensor count that does not fit in the file");
    if (n_keys_ > reader.remaining() / 13) reader.fail_here("has a key count that does not fit in the file");
}

void GgufFile::read_metadata(Reader& reader) {
    for (uint64_t i = 0; i < n_keys_; ++i) {
        std::string key =
            reader.read_string(format("the name of key %llu", static_cast<unsigned long long>(i)), kMaxName);
        if (key.empty()) reader.fail_here("has a key with an empty name");
        Value value = reader.read_value("key " + quoted(key));
        if (!values_.emplace(key, std::move(value)).second)
            reader.fail_here("has duplicate key " + quoted(key));
        keys_.push_back(std::move(key));
    }
    const Value* alignment = find("general.alignment");
    if (!alignment) return;
    const auto* number = alignment->is_array ? nullptr : std::get_if<uint64_t>(&alignment->scalar);
    if (!number || *number < 8 || *number > 1u << 20 || (*number & (*number - 1)) != 0) {
        fail(path_, "key 'general.alignment' must be a power of two from 8 to 2^20");
    }
    alignment_ = *number;
}

void GgufFile::read_tensors(Reader& reader, uint64_t file_size) {
    for (uint64_t i = 0; i < n_tensors_; ++i) {
        TensorInfo tensor;
        tensor.name = reader.read_string(
            format("the name of tensor %llu", static_cast<unsigned long long>(i)), kMaxName);
        const std::string what = "tensor " + quoted(tensor.name);
        if (tensor.name.empty()) reader.fail_here("has a tensor with an empty name");
        const uint32_t n_dimensions = reader.read<uint32_t>("the dimensions of " + what);
        if (n_dimensions < 1 || n_dimensions > GGML_MAX_DIMS) {
            reader.fail_here(
                format("%s has %u dimensions; expected 1 to %d", what.c_str(), n_dimensions, GGML_MAX_DIMS));
        }
        uint64_t n_elements = 1;
        for (uint32_t d = 0; d < n_dimensions; ++d) {
            const uint64_t dimension = reader.read<uint64_t>("the dimensions of " + what);
            constexpr uint64_t limit = std::numeric_limits<int64_t>::max() / 16;
            if (dimension == 0) reader.fail_here(what + " has a dimension of 0");
            if (dimension > limit / n_elements)
                reader.fail_here(what + " has dimensions whose product overflows");
            n_elements *= dimension;
            tensor.ne.push_back(static_cast<int64_t>(dimension));
        }
        const uint32_t type = reader.read<uint32_t>("the type of " + what);
        if (type >= GGML_TYPE_COUNT || ggml_blck_size(static_cast<ggml_type>(type)) == 0) {
            reader.fail_here(format("%s has the unknown type %u", what.c_str(), type));
        }
        tensor.type = static_cast<ggml_type>(type);
        const int64_t block = ggml_blck_size(tensor.type);
        if (tensor.ne[0] % block != 0) {
            reader.fail_here(
                format("%s has rows of %lld elements, not a multiple of the block size %lld of %s",
                       what.c_str(), static_cast<long long>(tensor.ne[0]), static_cast<long long>(block),
                       ggml_type_name(tensor.type)));
        }
        const uint64_t n_blocks = n_elements / static_cast<uint64_t>(block);
        const uint64_t block_bytes = ggml_type_size(tensor.type);
        if (n_blocks > (file_size - reader.position()) / block_bytes + 1)
            reader.fail_here(what + " is larger than the file, which is truncated or damaged");
        tensor.n_bytes = n_blocks * block_bytes;
        tensor.offset = reader.read<uint64_t>("the offset of " + what);
        if (tensor.offset % alignment_ != 0) {
            reader.fail_here(format("%s has an offset that is not a multiple of the alignment %llu",
                                    what.c_str(), static_cast<unsigned long long>(alignment_)));
        }
        if (!tensor_index_.emplace(tensor.name, tensors_.size()).second)
            reader.fail_here("has duplicate " + what);
        tensors_.push_back(std::move(tensor));
    }
}

void GgufFile::resolve_tensor_offsets(uint64_t end_of_infos, uint64_t size) {
    data_offset_ = (end_of_infos + alignment_ - 1) / alignment_ * alignment_;
    for (TensorInfo& tensor : tensors_) {
        if (data_offset_ > size || tensor.offset > size - data_offset_ ||
            tensor.n_bytes > size - data_offset_ - tensor.offset) {
            fail(path_,
                 format("tensor %s ends past the end of the file: the file is truncated or damaged "
                        "(%llu bytes at offset %llu of a data section of %llu)",
                        quoted(tensor.name).c_str(), static_cast<unsigned long long>(tensor.n_bytes),
                        static_cast<unsigned long long>(tensor.offset),
                        static_cast<unsigned long long>(size > data_offset_ ? size - data_offset_ : 0)));
        }
        tensor.offset += data_offset_;
    }
    std::vector<const TensorInfo*> by_offset;
    for (const TensorInfo& tensor : tensors_) by_offset.push_back(&tensor);
    std::sort(by_offset.begin(), by_offset.end(),
              [](const TensorInfo* a, const TensorInfo* b) { return a->offset < b->offset; });
    for (size_t i = 1; i < by_offset.size(); ++i) {
        if (by_offset[i]->offset < by_offset[i - 1]->offset + by_offset[i - 1]->n_bytes) {
            fail(path_, "tensors " + quoted(by_offset[i - 1]->name) + " and " + quoted(by_offset[i]->name) +
                            " overlap");
        }
    }
}

void GgufFile::require_not_truncated() const {
    for (size_t i = 0; i < n_parts(); ++i) {
        if (part(i).mapping_.truncated()) {
            fail(part(i).path_, "was truncated while in use: restore the file and open it again");
        }
    }
}

std::string GgufFile::other_kind() const {
    const auto text = [this](const char* key) -> std::string {
        const Value* value = find(key);
        const auto* found = value && !value->is_array ? std::get_if<std::string>(&value->scalar) : nullptr;
        return found ? *found : "";
    };
    const std::string type = text("general.type"), architecture = text("general.architecture");
    if (type == "adapter")
        return "a LoRA adapter, not a model: give it to its model with --lora, or merge it into the model's "
               "float weights with --lora of `pydiffusion convert` or `quantize`";
    if (type == "mmproj" || architecture == "clip")
        return "the vision part of a model (mmproj), not the model: open the model's own GGUF";
    if (type == "imatrix" || architecture == "imatrix")
        return "an importance matrix, not a model: it is for --imatrix of `pydiffusion convert` and "
               "`quantize`";
    return "";
}

const Value* GgufFile::find(const std::string& key) const {
    const auto found = values_.find(key);
    return found == values_.end() ? nullptr : &found->second;
}

const TensorInfo* GgufFile::find_tensor(const std::string& name) const {
    const auto found = tensor_index_.find(name);
    return found == tensor_index_.end() ? nullptr : &tensors_[found->second];
}

}  // namespace pydiffusion
