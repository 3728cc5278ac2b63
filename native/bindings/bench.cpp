// Build information and roofline measurements: versions, instruction sets, bandwidth, matmul rate.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bench/roofline.h"
#include "bindings/bindings.h"
#include "ggml-cpu.h"
#include "util/cpu_kernels.h"
#include "util/error.h"

namespace pydiffusion {

namespace {

// These may take seconds, so they release the GIL.
double matrix_rate(int n_threads, const std::string& type_name, const std::string& device,
                   const std::string& kernels) {
    const ggml_type type = type_by_name(type_name);
    const WithoutGil release;
    return measure_matrix_rate(n_threads, type, device, kernels);
}

double read_rate(int n_threads, const std::string& device) {
    const WithoutGil release;
    return measure_read_rate(n_threads, device);
}

nb::dict version() {
    const std::pair<const char*, int> features[] = {
        {"AVX", ggml_cpu_has_avx()},
        {"AVX2", ggml_cpu_has_avx2()},
        {"FMA", ggml_cpu_has_fma()},
        {"F16C", ggml_cpu_has_f16c()},
        {"AVX512", ggml_cpu_has_avx512()},
        {"AVX512_VNNI", ggml_cpu_has_avx512_vnni()},
        {"AVX512_BF16", ggml_cpu_has_avx512_bf16()},
        {"AMX_INT8", ggml_cpu_has_amx_int8()},
        {"NEON", ggml_cpu_has_neon()},
        {"SVE", ggml_cpu_has_sve()},
    };
    std::string cpu;
    for (const auto& [name, has] : features) {
        if (has) cpu += (cpu.empty() ? "" : " ") + std::string(name);
    }
    nb::dict d;
    d["ggml"] = ggml_version();
    d["ggml_commit"] = ggml_commit();
    d["nanobind"] = format("%d.%d.%d", NB_VERSION_MAJOR, NB_VERSION_MINOR, NB_VERSION_PATCH);
    d["cpu"] = cpu;
    return d;
}

}  // namespace

void bind_bench(nb::module_& m) {
    m.def("version", version,
          "Versions of the linked libraries, and the instruction sets that they were built for.");
    m.def("measure_read_rate", read_rate, nb::arg("n_threads"), nb::arg("device") = "cpu",
          "Memory bandwidth in bytes per second: reads on the CPU; on a device, reads and writes of a copy.");
    m.def("measure_matrix_rate", matrix_rate, nb::arg("n_threads"), nb::arg("type"),
          nb::arg("device") = "cpu", nb::arg("kernels") = "auto",
          "Operations per second of a matmul: a 4096 x 4096 matrix of a tensor type times 256 activations.");
    m.def("kernels", gemm::kernel_names, "Names of the matmul kernels that this CPU supports.");
}

}  // namespace pydiffusion
