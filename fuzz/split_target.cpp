// Fuzz target: split files. An input is the concatenated headers of the parts, each starting at a magic
// number. Expects a typed error, or a file with exactly the parts' tensors and keys.
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <string_view>

#include "file_check.h"
#include "gguf_mutator.h"
#include "memory_file.h"
#include "util/error.h"

namespace {

constexpr std::string_view kMagic = "GGUF";
constexpr size_t kMaxParts = 4;  // the last one extends to the end of the input
constexpr size_t kDataBytes = size_t{1} << 20;

// A folder with a symlink to each part: the reader checks their names.
class Folder {
  public:
    Folder() {
        std::string name = std::filesystem::temp_directory_path() / "pydiffusion-split-XXXXXX";
        require(mkdtemp(name.data()) != nullptr);
        path_ = name;
    }
    ~Folder() { std::filesystem::remove_all(path_); }

    std::string name(size_t i, size_t n_parts) const {
        char end[32];
        std::snprintf(end, sizeof end, "/m-%05zu-of-%05zu.gguf", i + 1, n_parts);
        return path_ + end;
    }
    void put(const std::string& name, const std::string& target) {
        require(symlink(target.c_str(), name.c_str()) == 0 || errno == EEXIST);
    }
    void remove(const std::string& name) { require(unlink(name.c_str()) == 0); }

  private:
    std::string path_;
};

std::vector<std::string_view> parts_of(std::string_view input) {
    std::vector<std::string_view> parts;
    while (parts.size() + 1 < kMaxParts) {
        const size_t end = input.find(kMagic, 1);
        if (end == input.npos) break;
        parts.push_back(input.substr(0, end));
        input.remove_prefix(end);
    }
    parts.push_back(input);
    return parts;
}

// Counts how far inputs get, printed at exit: a target that refuses all of them tests nothing.
struct Count {
    size_t n_inputs = 0, n_split = 0;
    ~Count() {
        std::fprintf(stderr, "%zu inputs: %zu opened as one file of several parts\n", n_inputs, n_split);
    }
} count;

bool is_integer(const pydiffusion::Value* value, uint64_t number) {
    if (!value) return false;
    const auto* u = std::get_if<uint64_t>(&value->scalar);
    const auto* i = std::get_if<int64_t>(&value->scalar);
    return u ? *u == number : i && *i >= 0 && static_cast<uint64_t>(*i) == number;
}

void check_split_file(const pydiffusion::GgufFile& file) {
    check_file(file);
    if (file.n_parts() == 1) return;
    size_t n_tensors = 0;
    uint64_t n_bytes = 0;
    for (size_t i = 0; i < file.n_parts(); ++i) {
        // Open each part on its own: the GgufFile of the first one now has all tensors and keys.
        const pydiffusion::GgufFile part(file.part(i).path());
        require(is_integer(part.find("split.no"), i) && is_integer(part.find("split.count"), file.n_parts()));
        require(is_integer(part.find("split.tensors.count"), file.tensors().size()));
        for (const pydiffusion::TensorInfo& tensor : part.tensors()) {
            const pydiffusion::TensorInfo& ours = file.tensors()[n_tensors++];
            require(ours.part == i && ours.name == tensor.name && ours.type == tensor.type);
            require(ours.ne == tensor.ne && ours.offset == tensor.offset);
        }
        for (const std::string& key : part.keys()) {
            if (key == "general.alignment") continue;  // differs per part
            const bool is_split_key =
                key == "split.no" || key == "split.count" || key == "split.tensors.count";
            const pydiffusion::Value *ours = file.find(key), *its = part.find(key);
            require((ours == nullptr) == is_split_key);
            if (ours && *its == *its) require(*ours == *its);  // a value with a NaN differs from itself
        }
        n_bytes += part.n_bytes();
    }
    require(n_tensors == file.tensors().size() && n_bytes == file.n_bytes_of_all_parts());
    file.require_not_truncated();
}

// Returns whether the path opens as a file of several parts.
bool opens(const std::string& path) {
    try {
        const auto file = pydiffusion::GgufFile::open_all_parts(path);
        check_split_file(*file);
        return file->n_parts() > 1;
    } catch (const pydiffusion::Error& error) {
        require(std::string(error.what()).find('\n') == std::string::npos);
        return false;
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static Folder folder;
    const auto parts = parts_of({reinterpret_cast<const char*>(data), size});
    const size_t n_parts = parts.size();
    for (size_t i = 0; i < n_parts; ++i) {
        const auto* part = reinterpret_cast<const uint8_t*>(parts[i].data());
        folder.put(folder.name(i, n_parts), memory_file(part, parts[i].size(), kDataBytes, i));
    }
    ++count.n_inputs;
    if (opens(folder.name(0, n_parts))) {
        ++count.n_split;
        remember_good(data, size);
    }
    // Some inputs again, opened by the last part, or with the last part missing.
    if (size % 8 == 0) require(n_parts == 1 || !opens(folder.name(n_parts - 1, n_parts)));
    if (size % 8 == 1) {
        folder.remove(folder.name(n_parts - 1, n_parts));
        require(!opens(folder.name(0, n_parts)));
    }
    return 0;
}
