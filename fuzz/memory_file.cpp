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

}  // namespace

std::string memory_file(const uint8_t* data, size_t size, size_t n_zeros) {
    static const int file = memfd_create("input", 0);
    require(file >= 0, "memfd_create");
    require(ftruncate(file, 0) == 0, "ftruncate");
    require(ftruncate(file, static_cast<off_t>(size + n_zeros)) == 0, "ftruncate");
    require(pwrite(file, data, size, 0) == static_cast<ssize_t>(size), "pwrite");
    return "/proc/self/fd/" + std::to_string(file);
}
