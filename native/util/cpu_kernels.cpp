#include "util/cpu_kernels.h"

#include "util/error.h"

#if defined(PYDIFFUSION_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pydiffusion {
namespace gemm {

namespace {

#if defined(PYDIFFUSION_AMX)

bool has_avx512_bf16() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return false;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

// A process must request permission for the tile state from Linux before using it (the kernel's
// Documentation/arch/x86/xstate.rst).
bool has_amx() {
    constexpr long request_permission = 0x1023, tile_data = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool in_hardware = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
    return in_hardware && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

#else

bool has_avx512_bf16() { return false; }
bool has_amx() { return false; }

#endif

constexpr Kernel kKernels[] = {Kernel::ggml, Kernel::avx512_bf16, Kernel::amx};

bool is_supported(Kernel kernel) {
    static const bool avx512 = has_avx512_bf16(), amx = has_amx();
    return kernel == Kernel::ggml || (kernel == Kernel::avx512_bf16 ? avx512 : amx);
}

}  // namespace

const char* name_of(Kernel kernel) {
    return kernel == Kernel::amx ? "amx" : kernel == Kernel::avx512_bf16 ? "avx512-bf16" : "ggml";
}

std::vector<std::string> kernel_names() {
    std::vector<std::string> names;
    for (const Kernel kernel : kKernels) {
        if (is_supported(kernel)) names.push_back(name_of(kernel));
    }
    return names;
}

Kernel fastest_kernel() {
    Kernel fastest = Kernel::ggml;
    for (const Kernel kernel : kKernels) {
        if (is_supported(kernel)) fastest = kernel;
    }
    return fastest;
}

Kernel kernel_by_name(const std::string& name) {
    if (name == "auto") return is_supported(Kernel::amx) ? Kernel::amx : Kernel::ggml;
    for (const Kernel kernel : kKernels) {
        if (name != name_of(kernel)) continue;
        if (!is_supported(kernel))
            throw Error(ErrorKind::argument,
                        "this CPU does not support the " + name + " kernels: choose auto");
        return kernel;
    }
    throw Error(ErrorKind::argument,
                "there are no kernels " + quoted(name) + ": choose auto, ggml, avx512-bf16 or amx");
}

}  // namespace gemm
}  // namespace pydiffusion
