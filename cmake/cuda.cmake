# CUDA build: architectures, nvcc, and the options of ggml's CUDA backend.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    execute_process(COMMAND nvidia-smi -L RESULT_VARIABLE no_gpu OUTPUT_QUIET ERROR_QUIET)
    if(no_gpu)
        # RTX 20, A100, RTX 30, RTX 40, H100 and H200, RTX 50. A single one (e.g. 89-real) builds in a fifth of
        # the time.
        set(CMAKE_CUDA_ARCHITECTURES 75-virtual 80-real 86-real 89-real 90a-real 120a-real)
    else()
        set(CMAKE_CUDA_ARCHITECTURES native)
    endif()
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
enable_language(CUDA)
# A Hopper GPU needs code for 90a, not 90: for warpgroup matmuls.
if(CMAKE_CUDA_ARCHITECTURES STREQUAL "native" AND CMAKE_CUDA_ARCHITECTURES_NATIVE MATCHES "90")
    set(CMAKE_CUDA_ARCHITECTURES ${CMAKE_CUDA_ARCHITECTURES_NATIVE})
endif()
list(TRANSFORM CMAKE_CUDA_ARCHITECTURES REPLACE "^90(-real)?$" "90a-real")
include(cmake/cuda_libraries.cmake)
message(STATUS "CUDA ${CUDAToolkit_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")

set(GGML_CUDA ON CACHE BOOL "" FORCE)
set(GGML_CUDA_GRAPHS ON CACHE BOOL "" FORCE)
set(GGML_CUDA_NCCL OFF CACHE BOOL "" FORCE)
# VMM links libcuda.so.1, without which (on a machine with no driver) the extension could not be imported.
set(GGML_CUDA_NO_VMM ON CACHE BOOL "" FORCE)
