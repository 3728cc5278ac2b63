# Our CUDA kernels, compiled for the CPU (cuda_emulation/): no CUDA toolkit, no GPU.
set(emulated_subjects
    attention attention_end cuda_emulation expert_matmul expert_rows expert_slots layer_kernels repacked_gated
    repacked_matmul router_kernels step_kernels step_kernels_mutations sum_embeddings
)
set(emulation_sources collectives emulate fiber memory_barriers mutation race_detection)
list(TRANSFORM emulation_sources REPLACE "(.+)" "cuda_emulation/\\1.cpp")

function(add_emulation_tests target prefix)
    target_sources(${target} PRIVATE ${emulation_sources})
    target_compile_definitions(${target} PRIVATE PYDIFFUSION_EMULATE_CUDA)
    # The folder of the tests, and the one with the emulated cuda_fp16.h.
    target_include_directories(${target} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}
        ${CMAKE_CURRENT_SOURCE_DIR}/cuda_emulation)
    foreach(subject ${emulated_subjects})
        target_sources(${target} PRIVATE ${subject}_test.cpp)
        add_test(NAME ${prefix}${subject} COMMAND ${target} --source-file=*/${subject}_test.cpp)
        set_tests_properties(${prefix}${subject} PROPERTIES FAIL_REGULAR_EXPRESSION "test cases: +0 " TIMEOUT 120)
    endforeach()
endfunction()

# nvcc knows #pragma unroll, and does not optimize by the types of pointers. Kernels and their reference must round
# alike, so neither may fuse a multiplication and an addition.
foreach(subject ${emulated_subjects})
    set_property(SOURCE ${subject}_test.cpp APPEND PROPERTY COMPILE_OPTIONS
        -Wno-unknown-pragmas -fno-strict-aliasing -ffp-contract=off)
endforeach()
# The emulation's own memory is shared by all threads of a block on purpose.
set_property(SOURCE ${emulation_sources} APPEND PROPERTY COMPILE_OPTIONS -fno-sanitize=thread)

if(NOT PYDIFFUSION_SANITIZE STREQUAL "thread")
    add_emulation_tests(pydiffusion_tests "")
endif()
# The same under ThreadSanitizer, which sees races between the threads of a block. It works in a layout of memory that
# a kernel may not give it at random.
if(CMAKE_SYSTEM_NAME STREQUAL "Linux" AND (NOT PYDIFFUSION_SANITIZE OR PYDIFFUSION_SANITIZE STREQUAL "thread"))
    include(CheckCXXSourceCompiles)
    set(CMAKE_REQUIRED_FLAGS -fsanitize=thread)
    check_cxx_source_compiles("int main() {}" PYDIFFUSION_HAS_THREAD_SANITIZER)
    unset(CMAKE_REQUIRED_FLAGS)
    if(NOT PYDIFFUSION_HAS_THREAD_SANITIZER)
        message(FATAL_ERROR "the C++ tests need ThreadSanitizer, which the compiler can't link: install it "
            "(Fedora: dnf install libtsan)")
    endif()
    add_executable(pydiffusion_race_tests main.cpp cuda_emulation/race_options.cpp)
    target_compile_options(pydiffusion_race_tests PRIVATE -fsanitize=thread -O2)
    target_link_options(pydiffusion_race_tests PRIVATE -fsanitize=thread)
    target_link_libraries(pydiffusion_race_tests PRIVATE doctest::doctest pydiffusion_native)
    target_enable_warnings(pydiffusion_race_tests)
    execute_process(COMMAND setarch -R true RESULT_VARIABLE no_setarch OUTPUT_QUIET ERROR_QUIET)
    if(NOT no_setarch)
        set_property(TARGET pydiffusion_race_tests PROPERTY CROSSCOMPILING_EMULATOR setarch -R)
    endif()
    add_emulation_tests(pydiffusion_race_tests races_)
endif()
