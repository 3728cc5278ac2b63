# Links the prebuilt libraries of a kit (scripts/gpu_prepare.sh) instead of building ggml and native/. Only the
# bindings are compiled, without network, ggml's sources or nvcc.
execute_process(
    COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/scripts/prebuilt.py check ${PYDIFFUSION_PREBUILT}
            --compiler "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
    RESULT_VARIABLE check_result ERROR_VARIABLE check_error ERROR_STRIP_TRAILING_WHITESPACE
)
if(NOT check_result EQUAL 0)
    message(FATAL_ERROR "${check_error}")
endif()

find_package(Threads REQUIRED)
set(linked Threads::Threads ${CMAKE_DL_LIBS})
foreach(name ggml-base ggml-cpu ggml-cuda ggml pydiffusion_native) # in link order: each depends on those before it
    set(archive ${PYDIFFUSION_PREBUILT}/lib/lib${name}.a)
    if(NOT EXISTS ${archive})
        continue() # ggml-cuda, in a kit without CUDA
    endif()
    if(name STREQUAL "ggml-cuda")
        include(cmake/cuda_libraries.cmake)
        list(APPEND linked CUDA::cudart CUDA::cublas)
    endif()
    add_library(${name} STATIC IMPORTED)
    set_target_properties(${name} PROPERTIES IMPORTED_LOCATION ${archive})
    target_link_libraries(${name} INTERFACE ${linked})
    list(PREPEND linked ${name})
endforeach()
target_include_directories(pydiffusion_native INTERFACE native ${PYDIFFUSION_PREBUILT}/include)
