// Runs CUDA kernels on the CPU, to test their source without a GPU: blocks one after the other, each thread
// of a block a fiber. Threads run in the order asked for, each as far as it can, so what a barrier should
// have ordered is out of order without it. Not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

struct dim3 {
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    unsigned x, y, z;
};

struct uint3 {
    unsigned x, y, z;
};

namespace pydiffusion::emulation {

// A kernel's error: a barrier that some threads don't reach, lanes of a mask that don't arrive, a race, ...
// The message names the source line, block and thread.
struct EmulationError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Of the threads of a block, and of the blocks. random: another order after every barrier and collective, the
// same at every run of the program.
enum class Order { forward, backward, random };
constexpr Order kOrders[] = {Order::forward, Order::backward, Order::random};

// kernel<<<grid, block, n_shared_bytes>>>(...), where `kernel` calls it: emulate(n, 256, 0, order, [&] {
// kernel(...); }). Shared memory is filled with 0xff bytes (NaN) before each block.
void emulate(dim3 grid, dim3 block, size_t n_shared_bytes, Order order, const std::function<void()>& kernel);

// A line of a kernel that calls one of the functions below.
struct Site {
    const char* function;
    const char* file;
    int line;
};

// --- deliberate faults, to see that a test would notice ---

enum class Fault {
    none,
    no_barrier,      // __syncthreads or __syncwarp returns at once
    mask_too_small,  // a mask lacks its highest lane
    late_copies,     // copy_async_wait leaves one group more under way
};

struct Mutation {
    Fault fault = Fault::none;
    std::string file;  // name without folders
    int line = 0;
    std::string text() const;
};

// Every fault that the kernels of `work`, which calls emulate(), can have, in the order of their lines.
std::vector<Mutation> mutations_of(const std::function<void()>& work);
// Calls `work` with its kernels mutated.
void with_mutation(const Mutation& mutation, const std::function<void()>& work);
// Whether is_right() is true even with the mutation: tests don't see that it is there. Calls it in a child
// process, which may crash, throw EmulationError or not end.
bool survives(const Mutation& mutation, const std::function<bool()>& is_right);

// --- for the emulated intrinsics; called by a kernel's thread ---

// All threads of the block. The second is part of another primitive: no mutation removes it.
void block_barrier(const Site& site);
void inner_block_barrier(const Site& site);

// A lane's values in a collective of its warp, and its results.
struct Words {
    uint32_t word[10];
};
using Combine = void (*)(const Words* given, Words* got, uint32_t mask);  // both [32]

// Waits for the lanes of `mask`, all of which must call this with the same line, mask and `combine`, then
// combines their words. orders_memory: what they wrote before is visible to each of them after.
void warp_collective(const char* what, uint32_t mask, Words& words, Combine combine, bool orders_memory,
                     const Site& site);

// Lets other threads run until one of them calls wake_waiting().
void wait_for_memory_barrier(const void* address, const Site& site);
void wake_waiting(const void* address);

// The dynamic shared memory of the running block, aligned to 128 bytes.
unsigned char* block_shared_memory();

// Asynchronous copies of the running thread; their bytes are copied by the caller, who takes them.
struct Copy {
    void* target;
    const void* source;
    int n_bytes;
};
void add_copy(const Copy& copy);
void commit_copies();
// Begins a wait that leaves the last `n_left` groups under way; then take_copy() gives the others' copies,
// until it returns false.
void begin_wait(int n_left, const Site& site);
bool take_copy(Copy& copy);

[[noreturn]] void fail(const std::string& what, const Site& site);
[[noreturn]] void fail_in_collective(const std::string& what);  // for a Combine

}  // namespace pydiffusion::emulation
