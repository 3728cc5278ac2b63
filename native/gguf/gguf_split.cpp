// Opens the parts of a split GGUF as one file. File names and keys are those of llama.cpp's gguf-split:
// NAME-00001-of-00003.gguf, the metadata in the first part, and `split.no` (0-based), `split.count` and
// `split.tensors.count` (over all parts) in each.
#include <algorithm>
#include <filesystem>  // also declares std::quoted, hence pydiffusion::quoted below

#include "gguf/gguf_file.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

const char* const kNumber = "split.no";
const char* const kCount = "split.count";
const char* const kTensors = "split.tensors.count";
constexpr int64_t kMaxParts = 65535;  // the keys are u16

[[noreturn]] void fail(const std::string& path, const std::string& what) {
    throw Error(ErrorKind::format, path + ": " + what);
}

// End of the name of the i-th part, 0-based.
std::string suffix(int64_t i, int64_t n_parts) {
    return format("-%05lld-of-%05lld.gguf", static_cast<long long>(i + 1), static_cast<long long>(n_parts));
}

int64_t read_integer(const GgufFile& file, const char* key, int64_t high) {
    const Value* value = file.find(key);
    if (!value) fail(file.path(), format("is part of a split file but has no key '%s'", key));
    int64_t number = -1;
    if (const auto* i = std::get_if<int64_t>(&value->scalar)) {
        number = *i;
    } else if (const auto* u = std::get_if<uint64_t>(&value->scalar)) {
        number = *u <= INT64_MAX ? static_cast<int64_t>(*u) : -1;
    }
    if (number < 0 || number > high) {
        fail(file.path(),
             format("key '%s' must be an integer from 0 to %lld", key, static_cast<long long>(high)));
    }
    return number;
}

// Keys that describe a single part rather than the model.
bool is_part_key(const std::string& key) {
    return key == kNumber || key == kCount || key == kTensors || key == "general.alignment";
}

}  // namespace

std::shared_ptr<GgufFile> GgufFile::open_all_parts(const std::string& path) {
    auto file = std::make_shared<GgufFile>(path);
    const int64_t n_parts = file->find(kCount) ? read_integer(*file, kCount, kMaxParts) : 1;
    if (n_parts < 2) return file;
    const int64_t number = read_integer(*file, kNumber, n_parts - 1);
    const std::string is_part = format("is part %lld of %lld of a split file",
                                       static_cast<long long>(number + 1), static_cast<long long>(n_parts));
    const std::string ending = suffix(number, n_parts);
    const size_t n_stem = path.size() < ending.size() ? 0 : path.size() - ending.size();
    if (path.substr(n_stem) != ending) fail(path, is_part + ": its name must end with " + ending);
    const std::string stem = path.substr(0, n_stem);
    if (number != 0) fail(path, is_part + "; open the first one, " + stem + suffix(0, n_parts));
    const int64_t n_tensors = read_integer(*file, kTensors, INT64_MAX);

    for (int64_t i = 1; i < n_parts; ++i) {
        const std::string expected = stem + suffix(i, n_parts);
        std::error_code error;  // ignored: a part that can't be accessed counts as missing
        if (!std::filesystem::exists(expected, error)) {
            fail(expected,
                 format("is missing: all %lld parts must be in one folder", static_cast<long long>(n_parts)));
        }
    }
    for (int64_t i = 1; i < n_parts; ++i) {
        auto part = std::make_unique<const GgufFile>(stem + suffix(i, n_parts));
        const std::pair<const char*, int64_t> wanted[] = {
            {kNumber, i}, {kCount, n_parts}, {kTensors, n_tensors}};
        for (const auto& [key, value] : wanted) {
            const int64_t found = read_integer(*part, key, INT64_MAX);
            if (found != value) {
                fail(part->path(), format("key '%s' is %lld, expected %lld: not the part that its name says",
                                          key, static_cast<long long>(found), static_cast<long long>(value)));
            }
        }
        file->append(std::move(part));
    }
    if (static_cast<uint64_t>(n_tensors) != file->tensors_.size()) {
        fail(path, format("key '%s' is %lld, but the %lld parts contain %zu tensors", kTensors,
                          static_cast<long long>(n_tensors), static_cast<long long>(n_parts),
                          file->tensors_.size()));
    }
    for (const char* key : {kNumber, kCount, kTensors}) {
        file->keys_.erase(std::find(file->keys_.begin(), file->keys_.end(), key));
        file->values_.erase(key);
    }
    return file;
}

void GgufFile::append(std::unique_ptr<const GgufFile> part) {
    for (TensorInfo tensor : part->tensors_) {
        tensor.part = n_parts();
        const auto [known, is_new] = tensor_index_.emplace(tensor.name, tensors_.size());
        if (!is_new) {
            fail(part->path_, "has tensor " + pydiffusion::quoted(tensor.name) + ", which is already in " +
                                  this->part(tensors_[known->second].part).path_);
        }
        tensors_.push_back(std::move(tensor));
    }
    for (const std::string& key : part->keys_) {
        if (is_part_key(key)) continue;
        const auto [known, is_new] = values_.emplace(key, *part->find(key));
        if (is_new) {
            keys_.push_back(key);
        } else if (!(known->second == *part->find(key))) {
            fail(part->path_,
                 "key " + pydiffusion::quoted(key) + " differs from its value in an earlier part");
        }
    }
    later_parts_.push_back(std::move(part));
}

uint64_t GgufFile::n_bytes_of_all_parts() const {
    uint64_t n_bytes = 0;
    for (size_t i = 0; i < n_parts(); ++i) n_bytes += part(i).n_bytes();
    return n_bytes;
}

}  // namespace pydiffusion
