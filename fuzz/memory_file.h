// In-memory files with paths, for code under test that opens a path.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

// Sets file `i` of this process to `data` followed by `n_zeros` zeros (sparse); returns its path.
std::string memory_file(const uint8_t* data, size_t size, size_t n_zeros, size_t i = 0);

// File 0 with `data`, then `tail` from the next multiple of 32 on.
std::string memory_file(const uint8_t* data, size_t size, const std::vector<uint8_t>& tail);
