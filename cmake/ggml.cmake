# ggml: fetches the pinned version, and builds it as static libraries.
execute_process(
    COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/vendor/fetch_ggml.py
    RESULT_VARIABLE fetch_result
)
if(NOT fetch_result EQUAL 0)
    message(FATAL_ERROR "failed to get the pinned ggml: see the message above")
endif()

if(SKBUILD_STATE STREQUAL "sdist")
    return()
endif()

set(BUILD_SHARED_LIBS OFF)
set(GGML_STATIC OFF CACHE BOOL "" FORCE) # ON would link the extension itself statically
set(GGML_BUILD_TESTS OFF CACHE BOOL "" FORCE)
set(GGML_BUILD_EXAMPLES OFF CACHE BOOL "" FORCE)
set(GGML_OPENMP OFF CACHE BOOL "" FORCE) # ggml's own thread pool: no OpenMP runtime to ship, no conflict with another
set(GGML_LLAMAFILE ON CACHE BOOL "" FORCE)
set(GGML_CCACHE OFF CACHE BOOL "" FORCE)
set(GGML_METAL OFF CACHE BOOL "" FORCE)
set(GGML_BLAS OFF CACHE BOOL "" FORCE)
set(GGML_ALL_WARNINGS OFF CACHE BOOL "" FORCE)
if(PYDIFFUSION_PORTABLE)
    set(GGML_NATIVE OFF CACHE BOOL "" FORCE)
    if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
        foreach(feature AVX AVX2 FMA F16C BMI2 SSE42)
            set(GGML_${feature} ON CACHE BOOL "" FORCE)
        endforeach()
    endif()
else()
    set(GGML_NATIVE ON CACHE BOOL "" FORCE)
endif()
if(PYDIFFUSION_CUDA)
    include(cmake/cuda.cmake)
endif()
set(GIT_EXE OFF CACHE STRING "" FORCE) # else ggml would report the commit of our repository
add_subdirectory(vendor/ggml ggml EXCLUDE_FROM_ALL)
