#include "backend/attention_node.h"

#include "ggml-cpp.h"
#include "support.h"

namespace pydiffusion {
namespace testing {

namespace {

// K or V of a cache, as GraphBuilder sees them: [256, 64 rows, 2 heads]
ggml_tensor* rows_of(ggml_context* ctx, ggml_tensor* cache) {
    return ggml_view_3d(ctx, cache, 256, 64, 2, cache->nb[1], 256 * sizeof(ggml_fp16_t), 0);
}

}  // namespace

TEST_CASE("attention by a kernel: what fits, and not a cache in the host's memory") {
    const ggml_context_ptr caches(ggml_init({2 * ggml_tensor_overhead(), nullptr, true}));
    const ggml_context_ptr context(ggml_init({16 * ggml_tensor_overhead(), nullptr, true}));
    ggml_context* ctx = context.get();
    ggml_tensor* cache = ggml_new_tensor_2d(caches.get(), GGML_TYPE_F16, 512, 64);
    ggml_tensor* q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 256, 4, 8);
    CHECK(can_attend_by_kernel(q, rows_of(ctx, cache), rows_of(ctx, cache)));  // as a plan sees it
    ggml_tensor* narrow = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 128, 4, 8);
    CHECK_FALSE(can_attend_by_kernel(narrow, rows_of(ctx, cache), rows_of(ctx, cache)));
    ggml_tensor* three = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 256, 3, 8);  // heads for 2 KV heads
    CHECK_FALSE(can_attend_by_kernel(three, rows_of(ctx, cache), rows_of(ctx, cache)));

    const ggml_backend_buffer_ptr buffer(
        ggml_backend_alloc_ctx_tensors_from_buft(caches.get(), ggml_backend_cpu_buffer_type()));
    REQUIRE(buffer);
    CHECK_FALSE(can_attend_by_kernel(q, rows_of(ctx, cache), rows_of(ctx, cache)));
}

}  // namespace testing
}  // namespace pydiffusion
