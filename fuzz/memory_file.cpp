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

int the_file() {
    static const int file = memfd_create("input", 0);
    require(file >= 0, "memfd_create");
    return file;
}

void write_at(const uint8_t* data, size_t size, size_t offset) {
    require(pwrite(the_file(), data, size, static_cast<off_t>(offset)) == static_cast<ssize_t>(size),
            "pwrite");
}

// Of this size and all zeros, before anything is written.
void resize(size_t size) {
    require(ftruncate(the_file(), 0) == 0, "ftruncate");
    require(ftruncate(the_file(), static_cast<off_t>(size)) == 0, "ftruncate");
}

std::string its_path() { return "/proc/self/fd/" + std::to_string(the_file()); }

}  // namespace

std::string memory_file(const uint8_t* data, size_t size, size_t n_zeros) {
    resize(size + n_zeros);
    write_at(data, size, 0);
    return its_path();
}

std::string memory_file(const uint8_t* data, size_t size, const std::vector<uint8_t>& tail) {
    const size_t tail_at = (size + 31) / 32 * 32;
    resize(tail_at + tail.size());
    write_at(data, size, 0);
    write_at(tail.data(), tail.size(), tail_at);
    return its_path();
}
