#include "cuda_emulation/memory_barriers.h"

#include <map>

#include "cuda_emulation/mutation.h"
#include "cuda_emulation/race_detection.h"

namespace pydiffusion::emulation {

namespace {

struct MemoryBarrier {
    int n_threads = 0, n_arrived = 0;
    int64_t n_expected = 0, n_copied = 0;  // bytes, in this phase
    uint32_t phase = 0;
    std::vector<Copy> copies;
};

std::map<const void*, MemoryBarrier> barriers;

MemoryBarrier& barrier_at(const void* address, const Site& site) {
    const auto found = barriers.find(address);
    if (found == barriers.end()) fail("a barrier that no thread has initialized", site);
    return found->second;
}

void end_phase(MemoryBarrier& barrier) {
    barrier.phase ^= 1;
    barrier.n_arrived = 0;
    barrier.n_expected = barrier.n_copied = 0;
}

}  // namespace

void init_memory_barrier(const void* barrier, int n, const Site& site) {
    const Unchecked unchecked;
    if (reinterpret_cast<uintptr_t>(barrier) % 8) fail("a misaligned barrier", site);
    if (n < 1) fail("a barrier of " + std::to_string(n) + " threads", site);
    barriers[barrier] = {};
    barriers[barrier].n_threads = n;
}

void arrive_at_memory_barrier(const void* address, int n_bytes, const Site& site) {
    const Unchecked unchecked;
    MemoryBarrier& barrier = barrier_at(address, site);
    if (++barrier.n_arrived > barrier.n_threads) fail("an arrival too many", site);
    barrier.n_expected += n_bytes;
    release(const_cast<void*>(address));
    if (barrier.n_arrived < barrier.n_threads) return;
    if (barrier.n_expected == 0 && barrier.copies.empty()) end_phase(barrier);
    wake_waiting(address);
}

void add_bulk_copy(const Copy& copy, const void* address, const Site& site) {
    const Unchecked unchecked;
    if (copy.n_bytes <= 0 || copy.n_bytes % 16)
        fail("a copy of " + std::to_string(copy.n_bytes) + " bytes", site);
    if (reinterpret_cast<uintptr_t>(copy.target) % 16) fail("a copy to a misaligned address", site);
    if (reinterpret_cast<uintptr_t>(copy.source) % 16) fail("a copy from a misaligned address", site);
    barrier_at(address, site).copies.push_back(copy);
    release(const_cast<void*>(address));
}

bool begin_memory_wait(const void* address, uint32_t phase, const Site& site) {
    const Unchecked unchecked;
    if (is_mutated(Fault::no_barrier, site)) return false;
    MemoryBarrier& barrier = barrier_at(address, site);
    while (barrier.phase == phase && barrier.n_arrived < barrier.n_threads)
        wait_for_memory_barrier(address, site);
    acquire(const_cast<void*>(address));
    return barrier.phase == phase;
}

bool take_bulk_copy(const void* address, Copy& copy) {
    const Unchecked unchecked;
    MemoryBarrier& barrier = barriers[address];
    if (barrier.copies.empty()) return false;
    copy = barrier.copies.back();
    barrier.copies.pop_back();
    barrier.n_copied += copy.n_bytes;
    return true;
}

void end_memory_wait(const void* address, const Site& site) {
    const Unchecked unchecked;
    MemoryBarrier& barrier = barriers[address];
    if (barrier.n_copied != barrier.n_expected) {
        fail("a barrier that expects " + std::to_string(barrier.n_expected) + " bytes, but gets " +
                 std::to_string(barrier.n_copied),
             site);
    }
    end_phase(barrier);
    release(const_cast<void*>(address));
}

bool reset_memory_barriers() {
    bool all_taken = true;
    for (const auto& [address, barrier] : barriers) all_taken = all_taken && barrier.copies.empty();
    barriers.clear();
    return all_taken;
}

}  // namespace pydiffusion::emulation
