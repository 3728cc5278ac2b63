// Files in memory that have paths, since the layers under test open one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

// Its content becomes `data` and then `n_zeros` zeros, which take no memory. One file per process and `i`.
std::string memory_file(const uint8_t* data, size_t size, size_t n_zeros, size_t i = 0);

// The first of them, with these bytes behind the header, from the next multiple of 32 on.
std::string memory_file(const uint8_t* data, size_t size, const std::vector<uint8_t>& tail);
