# Finds the libraries of a CUDA build: the toolkit's runtime, and cuBLAS from the toolkit or from the
# nvidia-cublas wheel, which has the headers and libcublas.so.13 but no unversioned libcublas.so.
find_package(CUDAToolkit REQUIRED)

set(PYDIFFUSION_CUBLAS "" CACHE PATH "Folder with include/ and lib/ of cuBLAS, if the toolkit has none")
if(NOT TARGET CUDA::cublas)
    if(NOT PYDIFFUSION_CUBLAS)
        execute_process(
            COMMAND ${Python_EXECUTABLE} -c
                    "import importlib.metadata as m; d = m.distribution('nvidia-cublas'); print(next(d.locate_file(f).resolve().parents[1] for f in d.files if f.name == 'cublas_v2.h'))"
            OUTPUT_VARIABLE PYDIFFUSION_CUBLAS OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET
        )
    endif()
    file(GLOB cublas ${PYDIFFUSION_CUBLAS}/lib/libcublas.so.*)
    file(GLOB cublas_lt ${PYDIFFUSION_CUBLAS}/lib/libcublasLt.so.*)
    if(NOT PYDIFFUSION_CUBLAS OR NOT cublas OR NOT cublas_lt)
        message(FATAL_ERROR
            "cuBLAS not found in the CUDA toolkit, the nvidia-cublas wheel or PYDIFFUSION_CUBLAS: run pip install "
            "nvidia-cublas and build with --no-build-isolation, or pass -Ccmake.define.PYDIFFUSION_CUBLAS=DIR, a "
            "folder with include/ and lib/")
    endif()
    add_library(CUDA::cublasLt SHARED IMPORTED GLOBAL)
    set_target_properties(CUDA::cublasLt PROPERTIES IMPORTED_LOCATION ${cublas_lt})
    add_library(CUDA::cublas SHARED IMPORTED GLOBAL)
    set_target_properties(CUDA::cublas PROPERTIES
        IMPORTED_LOCATION ${cublas}
        INTERFACE_INCLUDE_DIRECTORIES ${PYDIFFUSION_CUBLAS}/include
        INTERFACE_LINK_LIBRARIES CUDA::cublasLt)
endif()
