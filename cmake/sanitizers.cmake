# Sanitizers for all targets defined from here on, including ggml.
set(PYDIFFUSION_SANITIZE "" CACHE STRING "Sanitizers to build with, as in -fsanitize=: address,undefined or thread")
set_property(CACHE PYDIFFUSION_SANITIZE PROPERTY STRINGS ";address;undefined;address,undefined;thread")

if(PYDIFFUSION_SANITIZE)
    # UBSan errors abort, as those of the other sanitizers do.
    add_compile_options(-fsanitize=${PYDIFFUSION_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g)
    add_link_options(-fsanitize=${PYDIFFUSION_SANITIZE})
endif()
