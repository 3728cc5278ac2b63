// A mutator that knows where the fields of a GGUF lie: it changes one of them, or drops, doubles or swaps a
// whole entry, so that most inputs pass the checks that come before the one they are to try.
#include "gguf_mutator.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace {

// Splitmix64: seeded anew for every input, which a Mersenne twister takes longer for than all the rest.
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

// Walks through as much of the input as makes sense, believing nothing: one header, or several in a row (a
// split file), each from a magic number on.
class Walker {
  public:
    Walker(const uint8_t* data, size_t size) : data_(data), size_(size) {
        for (const uint8_t* next = data; next != data + size;
             next = std::search(data + at_, data + size, kMagic, kMagic + 4)) {
            at_ = static_cast<size_t>(next - data);
            failed_ = false;
            walk();
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

    void walk() {
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

uint64_t odd_number(Random& random, uint64_t old, size_t file_size) {
    static const uint64_t odd[] = {0,          1,          2,          3,          31,         32,
                                   33,         64,         127,        128,        255,        256,
                                   1023,       1024,       65535,      65536,      1u << 20,   0x7fffffff,
                                   0x80000000, 0xffffffff, 1ull << 32, 1ull << 40, 1ull << 61, 1ull << 62,
                                   ~0ull >> 1, 1ull << 63, ~0ull - 31, ~0ull};
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
            return odd[random() % (sizeof odd / sizeof *odd)];
    }
}

void change_field(Random& random, uint8_t* data, size_t size, const Walker& walker) {
    const Field field = walker.fields[random() % walker.fields.size()];
    if (field.size > 8) {  // text
        data[field.at + random() % field.size] ^= static_cast<uint8_t>(1u << (random() % 8));
        return;
    }
    uint64_t value = 0;
    if (random() % 4 == 0) {  // of another field of this size
        const Field other = walker.fields[random() % walker.fields.size()];
        std::memcpy(&value, data + other.at, std::min(field.size, other.size));
    } else {
        std::memcpy(&value, data + field.at, field.size);
        value = odd_number(random, value, size);
    }
    std::memcpy(data + field.at, &value, field.size);
}

// Keeps the counts right, so that what is left is read. A copy goes behind any entry of its kind, of another
// header too.
size_t change_entries(Random& random, uint8_t* data, size_t size, size_t max_size, const Walker& walker) {
    const Entry entry = walker.entries[random() % walker.entries.size()];
    Entry before = walker.entries[random() % walker.entries.size()];
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
        const Walker walker(data, size);
        if (walker.fields.empty()) return LLVMFuzzerMutate(data, size, max_size);
        if (!walker.entries.empty() && random() % 5 == 0) {
            size = change_entries(random, data, size, max_size, walker);
        } else {
            change_field(random, data, size, walker);
        }
    }
    return size;
}
