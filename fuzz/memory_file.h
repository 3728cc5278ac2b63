// A file in memory that has a path, since the layers under test open one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

// Its content becomes `data` and then `n_zeros` zeros, which take no memory. One file per process.
std::string memory_file(const uint8_t* data, size_t size, size_t n_zeros);
