# The C++ runtime, without the Python bindings.
add_library(pydiffusion_native STATIC
    native/adapters/adapter.cpp
    native/architectures/diffusion_gemma.cpp
    native/architectures/diffusion_gemma_file.cpp
    native/architectures/registry.cpp
    native/backend/attention_node.cpp
    native/backend/backend.cpp
    native/backend/cpu/amx/pack.cpp
    native/backend/cpu/amx/tile_gemm.cpp
    native/backend/cpu/amx/unpack.cpp
    native/backend/cpu/amx/weighted_sums.cpp
    native/backend/cpu/active_threads.cpp
    native/backend/cpu/attention.cpp
    native/backend/cpu/bf16_attention.cpp
    native/backend/cpu/fused_rows.cpp
    native/backend/cpu/graph_phases.cpp
    native/backend/cpu/low_rank.cpp
    native/backend/cpu/low_rank_tiles.cpp
    native/backend/cpu/matmul.cpp
    native/backend/cpu/measure_logits.cpp
    native/backend/cpu/self_conditioning.cpp
    native/backend/cpu/thread_pool.cpp
    native/backend/cpu/tile_attention.cpp
    native/backend/cpu/top_k.cpp
    native/backend/devices.cpp
    native/backend/fake_device.cpp
    native/backend/expert_nodes.cpp
    native/backend/graph_executor.cpp
    native/backend/graph_inputs.cpp
    native/backend/graph_memory.cpp
    native/backend/host_step_backend.cpp
    native/backend/mlp_beside.cpp
    native/backend/ops/cpu_ops.cpp
    native/backend/ops/ggml_attention.cpp
    native/backend/ops/ggml_ops.cpp
    native/backend/ops/ops.cpp
    native/backend/ops/own_kernel_ops.cpp
    native/backend/repacked_weights.cpp
    native/backend/rope_angles.cpp
    native/backend/step_backend.cpp
    native/bench/matmul_once.cpp
    native/bench/roofline.cpp
    native/gguf/gguf_file.cpp
    native/gguf/gguf_split.cpp
    native/graph/graph_builder.cpp
    native/graph/layer_trace.cpp
    native/kv_cache/kv_cache.cpp
    native/kv_cache/kv_layout.cpp
    native/model/device_plan.cpp
    native/model/hparams.cpp
    native/model/key_reader.cpp
    native/model/model.cpp
    native/model/weights.cpp
    native/model/weights_loader.cpp
    native/quantization/imatrix_collector.cpp
    native/quantization/quantize.cpp
    native/runtime/batch.cpp
    native/runtime/denoiser.cpp
    native/runtime/device_planner.cpp
    native/runtime/encoder.cpp
    native/runtime/generation.cpp
    native/runtime/session.cpp
    native/runtime/step.cpp
    native/sampler/entropy_bound.cpp
    native/sampler/logits.cpp
    native/sampler/philox.cpp
    native/sampler/registry.cpp
    native/sampler/sampler_options.cpp
    native/util/block_sizes.cpp
    native/util/cpu_kernels.cpp
    native/util/error.cpp
    native/vision/vision_graph.cpp
    native/vision/vision_hparams.cpp
    native/vision/vision_memory.cpp
    native/vision/vision_tower.cpp
    native/vision/vision_weights.cpp
)
target_include_directories(pydiffusion_native PUBLIC native)
target_include_directories(pydiffusion_native SYSTEM PRIVATE vendor/ggml/src)  # ggml's own headers
target_link_libraries(pydiffusion_native PUBLIC ggml)
if(PYDIFFUSION_CUDA)
    set(cuda_sources
        native/backend/cuda/attention.cu native/backend/cuda/expert_matmul.cu native/backend/cuda/layer_ops.cu
        native/backend/cuda/own_kernels.cu native/backend/cuda/repacked_matmul.cu native/backend/cuda/step_backend.cu
    )
    target_sources(pydiffusion_native PRIVATE ${cuda_sources})
    target_compile_definitions(pydiffusion_native PRIVATE PYDIFFUSION_CUDA)
    # Our kernels run on the stream in ggml's CUDA context, whose layout depends on these definitions.
    set_property(SOURCE ${cuda_sources}
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
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")  # false positives in GCC's intrinsics headers
        set_property(SOURCE native/backend/cpu/bf16_attention.cpp native/backend/cpu/tile_attention.cpp
            native/backend/cpu/amx/pack.cpp
            native/backend/cpu/amx/tile_gemm.cpp native/backend/cpu/amx/unpack.cpp
            native/backend/cpu/amx/weighted_sums.cpp
            APPEND PROPERTY COMPILE_OPTIONS "-Wno-uninitialized;-Wno-maybe-uninitialized")
        # Else GCC turns a loop that loads registers into a memcpy.
        set_property(SOURCE native/backend/cpu/amx/pack.cpp
            APPEND PROPERTY COMPILE_OPTIONS -fno-tree-loop-distribute-patterns)
    endif()
    # Flags that vectorize our loops at the full vector width. Unlike -ffast-math they keep NaN and infinity.
    set(loop_flags "-O3;-fno-math-errno;-fno-trapping-math;-ffp-contract=fast")
    if(NOT PYDIFFUSION_PORTABLE AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
        list(APPEND loop_flags -mprefer-vector-width=512)
    endif()
    set_property(SOURCE native/backend/cpu/attention.cpp native/backend/cpu/bf16_attention.cpp native/backend/cpu/fused_rows.cpp
        native/backend/cpu/low_rank.cpp native/backend/cpu/measure_logits.cpp native/backend/cpu/self_conditioning.cpp
        native/backend/cpu/tile_attention.cpp native/backend/cpu/top_k.cpp
        native/sampler/entropy_bound.cpp native/sampler/logits.cpp native/sampler/philox.cpp
        APPEND PROPERTY COMPILE_OPTIONS "${loop_flags}")
endif()
