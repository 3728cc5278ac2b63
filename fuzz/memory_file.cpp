#include "memory_file.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

namespace {

void require(bool ok, const char* what) {
    if (ok) return;
    std::perror(what);
    std::abort();
}

// Returns file i, created on first use, resized to `size` zeros.
int empty_file(size_t i, size_t size) {
    static std::vector<int> files;
    while (files.size() <= i) {
        files.push_back(memfd_create("input", 0));
        require(files.back() >= 0, "memfd_create");
    }
    require(ftruncate(files[i], 0) == 0, "ftruncate");
    require(ftruncate(files[i], static_cast<off_t>(size)) == 0, "ftruncate");
    return files[i];
}

void write_at(int file, const uint8_t* data, size_t size, size_t offset) {
    require(pwrite(file, data, size, static_cast<off_t>(offset)) == static_cast<ssize_t>(size), "pwrite");
}

std::string path_of(int file) { return "/proc/self/fd/" + std::to_string(file); }

}  // namespace

std::string memory_file(const uint8_t* data, size_t size, size_t n_zeros, size_t i) {
    const int file = empty_file(i, size + n_zeros);
    write_at(file, data, size, 0);
    return path_of(file);
}

std::string memory_file(const uint8_t* data, size_t size, const std::vector<uint8_t>& tail) {
    const size_t tail_at = (size + 31) / 32 * 32;
    const int file = empty_file(0, tail_at + tail.size());
    write_at(file, data, size, 0);
    write_at(file, tail.data(), tail.size(), tail_at);
    return path_of(file);
}
