// Matmul kernels of our own, and which of them this CPU supports.
#pragma once

#include <string>
#include <vector>

// Compilers that support AMX; kernels are selected at run time by what the CPU supports.
#if defined(__x86_64__) && defined(__linux__) && defined(__clang__) && __clang_major__ >= 12
#define PYDIFFUSION_AMX 1
#define PYDIFFUSION_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#elif defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 11
#define PYDIFFUSION_AMX 1
#define PYDIFFUSION_TARGET_AVX512 \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")))
#endif
#if defined(PYDIFFUSION_AMX)
#define PYDIFFUSION_TARGET_AMX __attribute__((target("avx512f,amx-tile,amx-bf16")))
#endif

namespace pydiffusion {
namespace gemm {

enum class Kernel {
    ggml,         // no tiles: ggml's own matmuls
    avx512_bf16,  // AVX-512 BF16
    amx,          // AMX BF16
};

// "ggml", "avx512-bf16", "amx", or "auto": AMX if the CPU has it, else ggml. (On a CPU with both, AVX-512
// BF16 was faster than ggml's matmuls for some types and far slower for others; CPUs without AMX have not
// been measured.) Throws Error(argument) for other names and for kernels that this CPU does not support.
Kernel kernel_by_name(const std::string& name);
// The last of kernel_names().
Kernel fastest_kernel();
const char* name_of(Kernel kernel);
// Names of the kernels that this CPU supports, the slowest first.
std::vector<std::string> kernel_names();

}  // namespace gemm
}  // namespace pydiffusion
