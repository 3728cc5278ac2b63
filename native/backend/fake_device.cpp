#include "backend/fake_device.h"

#include <algorithm>
#include <iterator>

#include "ggml-backend-impl.h"

namespace pydiffusion {

namespace {

struct FakeDevice {
    FakeDevice(ggml_backend_t cpu_backend, bool has_bf16);

    ggml_backend_ptr cpu;
    bool bf16;
    ggml_backend_reg registry = {};
    ggml_backend_device device = {};
    ggml_backend_buffer_type buffer_type = {};
    ggml_backend backend = {};
};

FakeDevice& of(ggml_backend_dev_t device) { return *static_cast<FakeDevice*>(device->context); }

const char* name_of_registry(ggml_backend_reg_t) { return kFakeRegistry; }
const char* name_of_device(ggml_backend_dev_t) { return "host"; }
const char* description_of(ggml_backend_dev_t) { return "CPU posing as a GPU"; }
void get_no_memory(ggml_backend_dev_t, size_t* free, size_t* total) { *free = *total = 0; }
enum ggml_backend_dev_type type_of(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; }

void get_properties(ggml_backend_dev_t device, ggml_backend_dev_props* properties) {
    *properties = {};
    properties->name = name_of_device(device);
    properties->description = description_of(device);
    properties->type = type_of(device);
}

const char* name_of_buffer_type(ggml_backend_buffer_type_t) { return "host"; }

// Some of the ops that ggml's CUDA backend has no kernel for: matmuls with ternary weights, and flash
// attention with other head sizes (512 needs grouped queries and a multiple of 256 rows).
bool lacks_kernel(const ggml_tensor* op, bool bf16) {
    const ggml_tensor *a = op->src[0], *b = op->src[1];
    switch (op->op) {
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
        case GGML_OP_GET_ROWS:
            return a->type == GGML_TYPE_TQ1_0 || a->type == GGML_TYPE_TQ2_0 ||
                   (a->type == GGML_TYPE_BF16 && !bf16);
        case GGML_OP_FLASH_ATTN_EXT: {
            constexpr int64_t sizes[] = {40, 64, 72, 80, 96, 112, 128, 256, 512};
            if (std::find(std::begin(sizes), std::end(sizes), a->ne[0]) == std::end(sizes)) return true;
            return a->ne[0] == 512 && (a->ne[2] == b->ne[2] || b->ne[1] % 256 != 0);
        }
        default:
            return false;
    }
}

bool is_on_another_device(ggml_backend_dev_t device, const ggml_tensor* operand) {
    if (!operand || !operand->buffer) return false;
    ggml_backend_buffer_type_t type = operand->buffer->buft;
    return type->iface.get_name == name_of_buffer_type && type != &of(device).buffer_type;
}

// Like CUDA, rejects operands in another device's memory.
bool supports_op(ggml_backend_dev_t device, const ggml_tensor* op) {
    for (const ggml_tensor* operand : op->src) {
        if (is_on_another_device(device, operand)) return false;
    }
    return !lacks_kernel(op, of(device).bf16) && ggml_backend_supports_op(of(device).cpu.get(), op);
}

ggml_backend_buffer_type_t buffer_type_of_device(ggml_backend_dev_t device) {
    return &of(device).buffer_type;
}

bool is_own_buffer_type(ggml_backend_dev_t device, ggml_backend_buffer_type_t type) {
    return type == &of(device).buffer_type;
}

// Host memory with a buffer type of its own, so that ggml treats it as device memory.
ggml_backend_buffer_t alloc_buffer_of(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer) buffer->buft = type;
    return buffer;
}

size_t alignment_of(ggml_backend_buffer_type_t) {
    return ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type());
}

const char* name_of_backend(ggml_backend_t) { return "host"; }
void free_backend(ggml_backend_t backend) { delete static_cast<FakeDevice*>(backend->context); }

ggml_status compute_graph(ggml_backend_t backend, ggml_cgraph* graph) {
    return ggml_backend_graph_compute(static_cast<FakeDevice*>(backend->context)->cpu.get(), graph);
}

FakeDevice::FakeDevice(ggml_backend_t cpu_backend, bool has_bf16) : cpu(cpu_backend), bf16(has_bf16) {
    device.context = this;
    registry.iface.get_name = name_of_registry;
    device.reg = &registry;
    device.iface.get_name = name_of_device;
    device.iface.get_description = description_of;
    device.iface.get_memory = get_no_memory;
    device.iface.get_type = type_of;
    device.iface.get_props = get_properties;
    device.iface.get_buffer_type = buffer_type_of_device;
    device.iface.supports_op = supports_op;
    device.iface.supports_buft = is_own_buffer_type;
    buffer_type.device = &device;
    buffer_type.iface.get_name = name_of_buffer_type;
    buffer_type.iface.alloc_buffer = alloc_buffer_of;
    buffer_type.iface.get_alignment = alignment_of;
    backend.device = &device;
    backend.context = this;
    backend.iface.get_name = name_of_backend;
    backend.iface.free = free_backend;
    backend.iface.graph_compute = compute_graph;
}

}  // namespace

ggml_backend_ptr make_fake_device(int n_threads, ggml_threadpool_t threads, bool bf16) {
    ggml_backend_t cpu = ggml_backend_cpu_init();
    if (!cpu) return nullptr;
    ggml_backend_cpu_set_n_threads(cpu, n_threads);
    ggml_backend_cpu_set_threadpool(cpu, threads);
    return ggml_backend_ptr(&(new FakeDevice(cpu, bf16))->backend);
}

}  // namespace pydiffusion
