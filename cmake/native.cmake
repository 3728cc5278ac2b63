# The runtime, which knows nothing of Python.
add_library(pydiffusion_native STATIC
    native/errors.cpp
    native/file.cpp
    native/split_file.cpp
    native/hyperparameters.cpp
    native/placement.cpp
    native/weights.cpp
    native/engine.cpp
    native/device/host_backend.cpp
    native/device/host_kernels.cpp
    native/matrix/kernels.cpp
    native/matrix/unpack.cpp
    native/matrix/columns.cpp
    native/matrix/product_ops.cpp
    native/matrix/multiply.cpp
    native/matrix/soft_sums.cpp
    native/matrix/attention_tiles.cpp
    native/portable_ops.cpp
    native/ops.cpp
    native/row_ops.cpp
    native/attention.cpp
    native/self_conditioning.cpp
    native/backbone.cpp
    native/kv_cache.cpp
    native/encoder.cpp
    native/denoiser.cpp
    native/sampler.cpp
    native/session.cpp
    native/batch.cpp
    native/quantize.cpp
    native/statistics.cpp
    native/machine_rates.cpp
)
target_include_directories(pydiffusion_native PUBLIC native PRIVATE vendor/ggml/src)  # ggml's own headers
target_link_libraries(pydiffusion_native PUBLIC ggml)
if(PYDIFFUSION_CUDA)
    target_sources(pydiffusion_native PRIVATE native/device/cuda_kernels.cu)
    target_compile_definitions(pydiffusion_native PRIVATE PYDIFFUSION_CUDA)
    # The layout of its context, whose stream ours is timed with, depends on them.
    set_property(SOURCE native/device/cuda_kernels.cu
        APPEND PROPERTY COMPILE_DEFINITIONS "$<TARGET_PROPERTY:ggml-cuda,COMPILE_DEFINITIONS>")
    target_link_libraries(pydiffusion_native PRIVATE CUDA::cudart CUDA::cublas)
endif()
target_enable_warnings(pydiffusion_native)
if(NOT MSVC)
    if(NOT PYDIFFUSION_PORTABLE)
        set(cxx_flags -march=native)
    elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
        set(cxx_flags -march=x86-64-v3)
    endif()
    target_compile_options(pydiffusion_native PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:${cxx_flags}>")
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")  # its own headers of intrinsics look uninitialised to it
        set_property(SOURCE native/matrix/attention_tiles.cpp native/matrix/columns.cpp
            native/matrix/kernels.cpp native/matrix/soft_sums.cpp native/matrix/unpack.cpp
            APPEND PROPERTY COMPILE_OPTIONS "-Wno-uninitialized;-Wno-maybe-uninitialized")
        # A loop that loads registers would become a copy in memory.
        set_property(SOURCE native/matrix/columns.cpp
            APPEND PROPERTY COMPILE_OPTIONS -fno-tree-loop-distribute-patterns)
    endif()
    # What the loops over logits need to become vector code, as wide as there is; NaN and infinity keep their
    # meaning.
    set(loop_flags "-O3;-fno-math-errno;-fno-trapping-math;-ffp-contract=fast")
    if(NOT PYDIFFUSION_PORTABLE AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
        list(APPEND loop_flags -mprefer-vector-width=512)
    endif()
    set_property(SOURCE native/attention.cpp native/matrix/attention_tiles.cpp native/ops.cpp native/row_ops.cpp
        native/sampler.cpp native/self_conditioning.cpp
        APPEND PROPERTY COMPILE_OPTIONS "${loop_flags}")
endif()
