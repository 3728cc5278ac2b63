#include "model/key_reader.h"

#include <algorithm>

#include "util/error.h"

namespace pydiffusion {

namespace {

std::string describe(const Value& value) {
    return value.is_array ? format("%s of %zu", value.type_name().c_str(), value.array_length())
                          : value.type_name();
}

}  // namespace

void KeyReader::refuse(const std::string& key, const std::string& what) const {
    throw Error(ErrorKind::format, file_.path() + ": key " + quoted(key) + " " + what);
}

void KeyReader::unsupported(const std::string& key, const std::string& what) const {
    throw Error(ErrorKind::unsupported, file_.path() + ": key " + quoted(key) + " " + what);
}

const Value& KeyReader::require(const std::string& key) const {
    const Value* value = file_.find(key);
    if (!value)
        throw Error(ErrorKind::format, file_.path() + ": required key " + quoted(key) + " is missing");
    return *value;
}

std::vector<int64_t> KeyReader::integers(const std::string& key) const {
    const Value& value = require(key);
    if (value.is_array) {
        if (value.integers.empty())
            refuse(key, "must be a non-empty array of integers, but is " + describe(value));
        return value.integers;
    }
    if (const auto* number = std::get_if<int64_t>(&value.scalar)) return {*number};
    if (const auto* flag = std::get_if<bool>(&value.scalar)) return {*flag ? 1 : 0};
    if (const auto* number = std::get_if<uint64_t>(&value.scalar)) {
        return {static_cast<int64_t>(std::min<uint64_t>(*number, INT64_MAX))};
    }
    refuse(key, "must be an integer, but is " + describe(value));
}

int32_t KeyReader::integer(const std::string& key, int64_t low, int64_t high) const {
    const std::vector<int64_t> all = integers(key);
    for (const int64_t value : all) {
        if (value != all[0]) unsupported(key, "differs between layers: not supported");
        check_range(key, value, low, high);
    }
    return static_cast<int32_t>(all[0]);
}

int32_t KeyReader::integer_or(const std::string& key, int32_t fallback, int64_t low, int64_t high) const {
    return has(key) ? integer(key, low, high) : fallback;
}

std::vector<int32_t> KeyReader::per_layer(const std::string& key, int32_t n_layer, int64_t low,
                                          int64_t high) const {
    const std::vector<int64_t> all = integers(key);
    const bool scalar = !require(key).is_array;
    if (!scalar && all.size() != static_cast<size_t>(n_layer)) {
        refuse(key, format("has %zu entries for %d layers", all.size(), n_layer));
    }
    std::vector<int32_t> result;
    for (int32_t i = 0; i < n_layer; ++i) {
        const int64_t value = all[scalar ? 0 : i];
        check_range(key, value, low, high);
        result.push_back(static_cast<int32_t>(value));
    }
    return result;
}

float KeyReader::number(const std::string& key, double low, double high) const {
    const Value& value = require(key);
    const auto* found = value.is_array ? nullptr : std::get_if<double>(&value.scalar);
    if (!found) refuse(key, "must be a float, but is " + describe(value));
    // As floats, since the file's are: 0.1f is more than 0.1.
    if (!(*found >= static_cast<float>(low) && *found <= static_cast<float>(high))) {
        refuse(key, format("is %g; it must be %g to %g", *found, low, high));
    }
    return static_cast<float>(*found);
}

float KeyReader::number_or(const std::string& key, float fallback, double low, double high) const {
    return has(key) ? number(key, low, high) : fallback;
}

std::string KeyReader::text(const std::string& key) const {
    const Value& value = require(key);
    const auto* found = value.is_array ? nullptr : std::get_if<std::string>(&value.scalar);
    if (!found) refuse(key, "must be a string");
    return *found;
}

void KeyReader::check_range(const std::string& key, int64_t value, int64_t low, int64_t high) const {
    if (value < low || value > high) {
        refuse(key, format("is %lld; it must be %lld to %lld", static_cast<long long>(value),
                           static_cast<long long>(low), static_cast<long long>(high)));
    }
}

}  // namespace pydiffusion
