# Compiler warnings for our own C++, but not for ggml and nanobind.
function(target_enable_warnings target)
    if(NOT MSVC)
        target_compile_options(${target} PRIVATE
            "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wno-unused-parameter>")
    endif()
endfunction()
