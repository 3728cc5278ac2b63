// Which layers and experts a plan puts on devices with a given memory budget.
#include "runtime/device_planner.h"

#include "small_model.h"
#include "support.h"

namespace pydiffusion {
namespace testing {

namespace {

constexpr uint32_t kF32 = 0;
constexpr uint64_t kPerLayer = 4096, kExperts = 65536, kEmbedding = 32 * 64 * 4;

// Four layers with a matrix of 4 KiB and experts of 64 KiB each.
struct Planner {
    Planner() {
        SmallModel model;
        model.sliding = {true, true, true, true};  // all alike
        GgufImage image = model.image();
        for (int i = 0; i < 4; ++i) {
            image.tensor_at_end(format("blk.%d.attn_q.weight", i), {32, 32}, kF32, kPerLayer);
            image.tensor_at_end(format("blk.%d.ffn_up_exps.weight", i), {32, 128, 4}, kF32, kExperts);
        }
        file = std::make_unique<GgufFile>(folder.write("model.gguf", image.bytes()));
        hp = std::make_unique<Hparams>(*file);
    }

    static std::vector<DeviceMemory> memory(const std::vector<uint64_t>& budgets) {
        std::vector<DeviceMemory> memory;
        for (const uint64_t budget : budgets) memory.push_back({ggml_backend_cpu_buffer_type(), budget, 0});
        return memory;
    }
    DevicePlan plan(const std::vector<uint64_t>& budgets, int32_t n_gpu_layers = -1,
                    int32_t n_cpu_moe = -1) const {
        return plan_devices(*file, *hp, needs, memory(budgets), n_gpu_layers, n_cpu_moe, DenseType::file);
    }
    std::vector<DeviceUse> use(const std::vector<int32_t>& layers, int32_t n_cpu_moe) const {
        return device_use(*file, *hp, {4, layers, n_cpu_moe}, needs,
                          memory(std::vector<uint64_t>(layers.size(), 0)));
    }

    TemporaryFolder folder;
    std::unique_ptr<GgufFile> file;
    std::unique_ptr<Hparams> hp;
    SessionNeeds needs = {1024, GGML_TYPE_F16, 1};
};

}  // namespace

TEST_CASE("where a plan puts things") {
    // Of 6 layers the last 2 + 3 on two devices, the experts of the last 2 with the CPU.
    const DevicePlan plan = {6, {2, 3}, 2};
    CHECK(plan.n_gpu_layers() == 5);
    CHECK(plan.any());
    CHECK_FALSE(plan.single_device());
    CHECK(plan.main_device() == 1);
    const int32_t devices[] = {kCpuDevice, 0, 0, 1, 1, 1};
    for (int32_t i = 0; i < 6; ++i) {
        CHECK(plan.layer_device(i) == devices[i]);
        CHECK(plan.experts_device(i) == (i < 4 ? devices[i] : kCpuDevice));
    }
    CHECK(plan.tensor_device("token_embd.weight") == 1);
    CHECK(plan.tensor_device("blk.0.attn_q.weight") == kCpuDevice);
    CHECK(plan.tensor_device("blk.2.attn_q.weight") == 0);
    CHECK(plan.tensor_device("blk.3.ffn_up_exps.weight") == 1);
    CHECK(plan.tensor_device("blk.5.ffn_up_exps.weight") == kCpuDevice);
    CHECK(plan.tensor_device("blk.5.ffn_up.weight") == 1);
    // Scales are where the results are that they multiply; the router's with their layer.
    CHECK(plan.tensor_device("blk.5.ffn_up_exps.scale") == kCpuDevice);
    CHECK(plan.tensor_device("blk.5.ffn_gate_up_exps.scale") == kCpuDevice);
    CHECK(plan.tensor_device("blk.5.ffn_down_exps.scale") == 1);

    const DevicePlan cpu = {6, {}, 0}, whole = {6, {6}, 0};
    CHECK_FALSE(cpu.any());
    CHECK(cpu.single_device());
    CHECK(cpu.main_device() == kCpuDevice);
    CHECK(cpu.layer_device(5) == kCpuDevice);
    CHECK(cpu.tensor_device("token_embd.weight") == kCpuDevice);
    CHECK(whole.single_device());
    CHECK(whole.tensor_device("blk.0.attn_q.weight") == 0);
}

TEST_CASE("what a plan takes") {
    const Planner planner;
    const std::vector<DeviceUse> all = planner.use({4}, 0), two = planner.use({2}, 1);
    REQUIRE(all.size() == 1);
    CHECK(all[0].weights == 4 * (kPerLayer + kExperts) + kEmbedding);
    CHECK(two[0].weights == 2 * kPerLayer + kExperts + kEmbedding);
    CHECK(all[0].step == two[0].step);
    CHECK(all[0].total() == all[0].weights + all[0].cache + all[0].step);
    const std::vector<DeviceUse> split = planner.use({1, 3}, 0);
    CHECK(split[0].weights == kPerLayer + kExperts);
    CHECK(split[1].weights == 3 * (kPerLayer + kExperts) + kEmbedding);
    CHECK(split[0].cache + split[1].cache == all[0].cache);
    CHECK(split[0].step < split[1].step);  // which embeds and samples too
    CHECK(planner.use({0}, 0)[0].total() == 0);

    Planner more;
    more.needs.n_sessions = 3;
    CHECK(more.use({4}, 0)[0].cache == 3 * all[0].cache);
    CHECK(more.use({4}, 0)[0].weights == all[0].weights);
}

TEST_CASE("an image takes a plan's memory up to the context") {
    Planner planner;  // with a context of 1024
    const auto use = [&](int64_t most, int64_t usual) {
        planner.needs.image_tokens = most;
        planner.needs.usual_image_tokens = usual;
        return planner.use({4}, 0)[0];
    };
    CHECK(use(1120, 600).step > use(1120, 280).step);  // more than a chunk of a prompt
    CHECK(use(1120, 1000).cache == use(1120, 280).cache);
    CHECK(use(1000, 280).cache > use(280, 280).cache);
    CHECK(use(1120, 1120).step == use(1120, 1024).step);
}

TEST_CASE("the smallest device that has room beside what is kept free") {
    constexpr uint64_t mib = uint64_t{1} << 20;
    CHECK(reserved_bytes(UINT64_MAX, 0) == 512 * mib);  // the least
    CHECK(reserved_bytes(UINT64_MAX, 80 * 1024 * mib) == 4 * 1024 * mib);
    CHECK(reserved_bytes(100 * mib, 80 * 1024 * mib) == 100 * mib);
    for (const uint64_t n_bytes : {uint64_t{0}, 100 * mib, 9728 * mib, 9729 * mib, 70000 * mib + 7}) {
        CAPTURE(n_bytes);
        const uint64_t whole = smallest_device(n_bytes), smaller = whole - mib;
        CHECK(whole - reserved_bytes(whole, whole) >= n_bytes);
        CHECK((smaller - reserved_bytes(smaller, smaller) < n_bytes || n_bytes == 0));
    }
}

TEST_CASE("one device: all, then without experts, then fewer layers") {
    const Planner planner;
    const auto budget = [&](int32_t n_layers, int32_t n_cpu_moe) {
        return planner.use({n_layers}, n_cpu_moe)[0].total();
    };
    const auto check = [&](uint64_t bytes, int32_t n_layers, int32_t n_cpu_moe) {
        const DevicePlan plan = planner.plan({bytes});
        CHECK(plan.n_gpu_layers() == n_layers);
        CHECK(plan.n_cpu_moe == n_cpu_moe);
    };
    check(UINT64_MAX, 4, 0);
    check(budget(4, 0), 4, 0);
    check(budget(4, 0) - 1, 4, 1);
    check(budget(4, 1) - 1, 4, 2);
    check(budget(4, 4), 4, 4);
    check(budget(4, 4) - 1, 3, 2);  // the cache of a layer less makes room for experts
    check(budget(3, 3), 3, 3);
    check(budget(1, 1), 1, 1);
    check(budget(1, 1) - 1, 0, 0);
    check(0, 0, 0);
}

TEST_CASE("BF16 where the whole model is on devices that multiply it fast") {
    constexpr uint32_t q8_0 = 8;
    SmallModel model;
    model.sliding = {true, true};
    GgufImage image = model.image();
    for (int i = 0; i < 2; ++i) {
        image.tensor_at_end(format("blk.%d.attn_q.weight", i), {32, 32}, q8_0, 32 * 34);
        image.tensor_at_end(format("blk.%d.ffn_up_exps.weight", i), {32, 128, 4}, q8_0, 128 * 4 * 34);
    }
    const TemporaryFolder folder;
    const GgufFile file(folder.write("model.gguf", image.bytes()));
    const Hparams hp(file);
    const SessionNeeds needs = {1024, GGML_TYPE_F16, 1};
    const auto plan = [&](uint64_t budget, bool fast, DenseType type, int32_t n_gpu_layers = -1,
                          int32_t n_cpu_moe = -1) {
        return plan_devices(file, hp, needs, {{ggml_backend_cpu_buffer_type(), budget, 0, fast}},
                            n_gpu_layers, n_cpu_moe, type);
    };
    const auto total = [&](const DevicePlan& of) {
        return device_use(file, hp, of, needs, {{ggml_backend_cpu_buffer_type(), 0, 0}})[0].total();
    };
    const DevicePlan wide = plan(UINT64_MAX, false, DenseType::bf16),
                     narrow = plan(UINT64_MAX, true, DenseType::file);
    CHECK(wide.dense_bf16);
    CHECK_FALSE(narrow.dense_bf16);
    CHECK(total(wide) - total(narrow) == 2 * 32 * (2 * 32 - 34));
    CHECK(wide.device_type("blk.0.attn_q.weight", GGML_TYPE_Q8_0) == GGML_TYPE_BF16);
    CHECK(wide.device_type("blk.0.ffn_up_exps.weight", GGML_TYPE_Q8_0) == GGML_TYPE_Q8_0);
    CHECK(wide.device_type("token_embd.weight", GGML_TYPE_F16) == GGML_TYPE_F16);
    CHECK(narrow.device_type("blk.0.attn_q.weight", GGML_TYPE_Q8_0) == GGML_TYPE_Q8_0);

    CHECK(plan(total(wide), true, DenseType::automatic).dense_bf16);
    CHECK_FALSE(plan(total(wide), false, DenseType::automatic).dense_bf16);
    CHECK_FALSE(plan(total(wide) - 1, true, DenseType::automatic).dense_bf16);
    CHECK(plan(total(wide) - 1, true, DenseType::automatic).n_gpu_layers() == 2);
    CHECK_FALSE(plan(UINT64_MAX, true, DenseType::automatic, 1).dense_bf16);
    CHECK_FALSE(plan(UINT64_MAX, true, DenseType::automatic, 2, 1).dense_bf16);
    CHECK(plan(UINT64_MAX, true, DenseType::bf16, 1).dense_bf16);
    CHECK(plan(total(wide) - 1, true, DenseType::bf16).n_cpu_moe == 1);
    CHECK_FALSE(plan(0, true, DenseType::bf16).dense_bf16);
}

TEST_CASE("what is asked for is taken as it is, or refused") {
    const Planner planner;
    const uint64_t budget = planner.use({2}, 1)[0].total();
    CHECK(planner.plan({budget}, 2).n_cpu_moe == 1);
    CHECK(planner.plan({budget}, 2, 2).n_cpu_moe == 2);
    CHECK(planner.plan({UINT64_MAX}, 99).n_gpu_layers() == 4);
    CHECK(planner.plan({0}, 0).n_gpu_layers() == 0);
    CHECK_ERROR(planner.plan({budget}, 2, 0), out_of_memory, "2 layers");
    CHECK_ERROR(planner.plan({budget}, 4), out_of_memory, "4 layers");
    CHECK_ERROR(planner.plan({budget / 2, budget / 2}, 4), out_of_memory, "4 layers");
}

TEST_CASE("several devices share the layers by their budgets") {
    const Planner planner;
    const uint64_t step = planner.use({1, 0}, 0)[0].step, main_step = planner.use({0, 4}, 0)[1].step;
    const uint64_t layer = kPerLayer + kExperts + planner.use({1, 0}, 0)[0].cache;
    const auto layers = [&](uint64_t first, uint64_t last) {
        return planner.plan({step + first, main_step + kEmbedding + last}).device_layers;
    };
    CHECK(layers(100 * layer, 100 * layer) == std::vector<int32_t>{2, 2});
    CHECK(layers(100 * layer, 300 * layer) == std::vector<int32_t>{1, 3});
    CHECK(layers(300 * layer, 100 * layer) == std::vector<int32_t>{3, 1});
    CHECK(layers(100000 * layer, 2 * layer) == std::vector<int32_t>{4, 0});
    // Three alike.
    const uint64_t budget = 100 * layer;
    const DevicePlan plan = planner.plan({step + budget, step + budget, main_step + kEmbedding + budget});
    CHECK(plan.n_gpu_layers() == 4);
    for (const int32_t n : plan.device_layers) CHECK(n <= 2);
}

}  // namespace testing
}  // namespace pydiffusion
