// Structure-aware GGUF mutator: changes a single field, or drops or duplicates a whole entry, so that most
// inputs pass the checks before the one under test.
#include "gguf_mutator.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace {

// Splitmix64: it is reseeded for every input, which would dominate the run time with a Mersenne twister.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t operator()() {
        uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }

  private:
    uint64_t state_;
};

struct Field {
    size_t at, size;
};

struct Entry {
    size_t header, begin, end;
    bool is_tensor;
};

// Finds the fields of as much of the input as parses: one header, or several in a row (a split file), each
// starting at a magic number.
class FieldParser {
  public:
    FieldParser(const uint8_t* data, size_t size) : data_(data), size_(size) {
        for (const uint8_t* next = data; next != data + size;
             next = std::search(data + at_, data + size, kMagic, kMagic + 4)) {
            at_ = static_cast<size_t>(next - data);
            failed_ = false;
            parse();
        }
    }
    std::vector<Field> fields;
    std::vector<Entry> entries;

  private:
    static constexpr uint8_t kMagic[] = {'G', 'G', 'U', 'F'};

    uint64_t number(size_t n) {
        uint64_t value = 0;
        if (failed_ || n > size_ - at_) {
            failed_ = true;
            return 0;
        }
        std::memcpy(&value, data_ + at_, n);
        fields.push_back({at_, n});
        at_ += n;
        return value;
    }

    void string() {
        const uint64_t n = number(8);
        if (failed_ || n > size_ - at_) {
            failed_ = true;
            return;
        }
        if (n) fields.push_back({at_, static_cast<size_t>(n)});
        at_ += n;
    }

    void scalar(uint64_t type) {
        static const size_t sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
        if (type == 8) {
            string();
        } else if (type > 12 || type == 9) {
            failed_ = true;
        } else {
            number(sizes[type]);
        }
    }

    void parse() {
        const size_t header = at_;
        number(4);
        number(4);
        const uint64_t n_tensors = number(8), n_keys = number(8);
        for (uint64_t i = 0; i < n_keys && !failed_; ++i) {
            const size_t begin = at_;
            string();
            uint64_t type = number(4), length = 1;
            if (type == 9) {
                type = number(4);
                length = number(8);
            }
            for (uint64_t j = 0; j < length && !failed_; ++j) scalar(type);
            if (!failed_) entries.push_back({header, begin, at_, false});
        }
        for (uint64_t i = 0; i < n_tensors && !failed_; ++i) {
            const size_t begin = at_;
            string();
            const uint64_t n_dimensions = number(4);
            for (uint64_t d = 0; d < n_dimensions && !failed_; ++d) number(8);
            number(4);
            number(8);
            if (!failed_) entries.push_back({header, begin, at_, true});
        }
    }

    const uint8_t* data_;
    size_t size_, at_ = 0;
    bool failed_ = false;
};

constexpr size_t kMaxGood = 256;

std::vector<std::vector<uint8_t>>& good_inputs() {
    static std::vector<std::vector<uint8_t>> inputs;
    return inputs;
}

uint64_t edge_case(Random& random, uint64_t old, size_t file_size) {
    static const uint64_t edge_cases[] = {
        0,          1,          2,          3,          31,         32,         33,
        64,         127,        128,        255,        256,        1023,       1024,
        65535,      65536,      1u << 20,   0x7fffffff, 0x80000000, 0xffffffff, 1ull << 32,
        1ull << 40, 1ull << 61, 1ull << 62, ~0ull >> 1, 1ull << 63, ~0ull - 31, ~0ull};
    switch (random() % 6) {
        case 0:
            return old + 1;
        case 1:
            return old - 1;
        case 2:
            return old * 2;
        case 3:
            return old ^ (1ull << (random() % 64));
        case 4:
            return file_size + random() % 65 - 32;
        default:
            return edge_cases[random() % (sizeof edge_cases / sizeof *edge_cases)];
    }
}

void change_field(Random& random, uint8_t* data, size_t size, const FieldParser& parser) {
    const Field field = parser.fields[random() % parser.fields.size()];
    if (field.size > 8) {  // text
        data[field.at + random() % field.size] ^= static_cast<uint8_t>(1u << (random() % 8));
        return;
    }
    uint64_t value = 0;
    if (random() % 4 == 0) {  // the value of another field
        const Field other = parser.fields[random() % parser.fields.size()];
        std::memcpy(&value, data + other.at, std::min(field.size, other.size));
    } else {
        std::memcpy(&value, data + field.at, field.size);
        value = edge_case(random, value, size);
    }
    std::memcpy(data + field.at, &value, field.size);
}

// Drops or duplicates an entry and updates its header's count, so that the rest still parses. A copy is
// inserted after any entry of the same kind, possibly of another header.
size_t change_entries(Random& random, uint8_t* data, size_t size, size_t max_size,
                      const FieldParser& parser) {
    const Entry entry = parser.entries[random() % parser.entries.size()];
    Entry before = parser.entries[random() % parser.entries.size()];
    if (before.is_tensor != entry.is_tensor) before = entry;
    const size_t n = entry.end - entry.begin, n_count = entry.is_tensor ? 8 : 16;
    const bool copies = random() % 2 && size + n <= max_size;
    uint8_t* count_at = data + (copies ? before.header : entry.header) + n_count;
    uint64_t count;
    std::memcpy(&count, count_at, 8);
    count += copies ? 1 : -1;
    std::memcpy(count_at, &count, 8);
    if (copies) {
        std::vector<uint8_t> copy(data + entry.begin, data + entry.end);
        if (copy.size() > 9 && random() % 2) copy[8] ^= 1;  // under another name
        std::memmove(data + before.end + n, data + before.end, size - before.end);
        std::memcpy(data + before.end, copy.data(), n);
        return size + n;
    }
    std::memmove(data + entry.begin, data + entry.end, size - entry.end);
    return size - n;
}

}  // namespace

void remember_good(const uint8_t* data, size_t size) {
    std::vector<std::vector<uint8_t>>& good = good_inputs();
    if (good.size() < kMaxGood) good.emplace_back(data, data + size);
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned int seed) {
    Random random(seed);
    const std::vector<std::vector<uint8_t>>& good = good_inputs();
    if (!good.empty() && random() % 8 != 0) {
        const std::vector<uint8_t>& start = good[random() % good.size()];
        if (start.size() <= max_size) {
            std::copy(start.begin(), start.end(), data);
            size = start.size();
        }
    }
    if (size < 24 || random() % 8 == 0) return LLVMFuzzerMutate(data, size, max_size);
    for (unsigned i = 0, n = 1 + random() % 3; i < n; ++i) {
        const FieldParser parser(data, size);
        if (parser.fields.empty()) return LLVMFuzzerMutate(data, size, max_size);
        if (!parser.entries.empty() && random() % 5 == 0) {
            size = change_entries(random, data, size, max_size, parser);
        } else {
            change_field(random, data, size, parser);
        }
    }
    return size;
}
