# Sanitizers for all that is compiled from here on, ggml included.
set(PYDIFFUSION_SANITIZE "" CACHE STRING "Sanitizers to build with, as -fsanitize takes them: address,undefined or thread")
set_property(CACHE PYDIFFUSION_SANITIZE PROPERTY STRINGS ";address;undefined;address,undefined;thread")

if(PYDIFFUSION_SANITIZE)
    # What UBSan finds ends the process, as what the others find does.
    add_compile_options(-fsanitize=${PYDIFFUSION_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g)
    add_link_options(-fsanitize=${PYDIFFUSION_SANITIZE})
endif()
