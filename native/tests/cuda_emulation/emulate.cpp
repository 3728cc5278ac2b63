#include "cuda_emulation/emulate.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <new>
#include <numeric>
#include <random>

#include "cuda_emulation/cuda.h"
#include "cuda_emulation/fiber.h"
#include "cuda_emulation/memory_barriers.h"
#include "cuda_emulation/mutation.h"
#include "cuda_emulation/race_detection.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Where the linker puts the kernels' __shared__ variables; null in a program without any.
#if defined(__ELF__)
extern "C" {
__attribute__((weak)) extern char __start_pydiffusion_shared[];
__attribute__((weak)) extern char __stop_pydiffusion_shared[];
}
#else
static char *__start_pydiffusion_shared = nullptr, *__stop_pydiffusion_shared = nullptr;
#endif

namespace pydiffusion::emulation {

namespace {

constexpr int kLanes = 32;
constexpr size_t kSharedAlignment = 128;

std::string where(const Site& site) {
    return std::string(site.function) + " (" + base_name(site.file) + ":" + std::to_string(site.line) + ")";
}

std::string hex(uint32_t value) {
    char text[16];
    snprintf(text, sizeof text, "0x%08x", value);
    return text;
}

std::string text_of(const uint3& i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

bool same_line(const Site& a, const Site& b) {
    return a.line == b.line && (a.file == b.file || !std::strcmp(a.file, b.file));
}

enum class State { ready, at_barrier, at_collective, at_memory_barrier, done };

// The collective that a thread waits for.
struct Collective {
    const char* what = "";
    uint32_t mask = 0;
    Combine combine = nullptr;
    Site site = {};
};

struct Thread : Collective {
    Fiber fiber;
    uint3 index = {};
    int number = 0;  // in its block
    State state = State::done;
    Words words = {};
    const void* memory_barrier = nullptr;  // that it waits for

    std::deque<std::vector<Copy>> groups;  // oldest first; the last is not committed yet
    size_t n_due = 0;                      // groups that a wait takes
};

// Sets of lanes.
struct Warp {
    uint32_t exists, ended, waiting;  // waiting: at a collective
    char keys[kLanes];  // ThreadSanitizer orders by address: one for each set of lanes that synchronizes
};

struct Aborted {};  // ends a thread after another's error

// A block being run. Threads keep their fibers from block to block.
class Block {
  public:
    void run(dim3 size, size_t n_shared_bytes, Order order, std::mt19937& random,
             const std::function<void()>& kernel);

    void barrier(const Site& site);
    void wait_for_memory_barrier(const void* address, const Site& site);
    void wake(const void* address);
    void collective(const Collective& called, Words& words, bool orders_memory);
    Thread& running() const { return *running_; }
    unsigned char* shared() const { return shared_.get(); }

  private:
    struct FreeAligned {
        void operator()(unsigned char* p) const {
            ::operator delete[](p, std::align_val_t{kSharedAlignment});
        }
    };

    static void run_thread(void* block);
    void prepare(dim3 size, size_t n_shared_bytes);
    void schedule(Order order, std::mt19937& random);
    bool pass(int warp, Order order, std::mt19937& random);
    void wait(State state);
    void open_barrier();
    [[noreturn]] void fail_waiting(const Thread& thread) const;
    void abort();
    void require_same(const Thread& own, const Thread& other) const;
    void complete(const Thread& last);
    Thread& lane_of(const Thread& thread, int lane) const {
        return *threads_[thread.number / kLanes * kLanes + lane];
    }
    int n_warps() const { return (n_threads_ + kLanes - 1) / kLanes; }

    std::vector<std::unique_ptr<Thread>> threads_;
    std::vector<Warp> warps_;
    int n_threads_ = 0;
    const std::function<void()>* kernel_ = nullptr;
    Thread* running_ = nullptr;
    std::unique_ptr<unsigned char[], FreeAligned> shared_;
    std::exception_ptr error_;
    bool is_aborted_ = false;
    char begin_key_ = 0, barrier_key_ = 0, end_key_ = 0;
};

Block* running_block = nullptr;

// Not memset: AddressSanitizer keeps bytes of its own between the variables.
__attribute__((no_sanitize("address"))) void poison_static_shared() {
    volatile char* begin = __start_pydiffusion_shared;
    for (volatile char* p = begin; p != __stop_pydiffusion_shared; ++p) *p = static_cast<char>(0xff);
}

void Block::prepare(dim3 size, size_t n_shared_bytes) {
    n_threads_ = static_cast<int>(size.x * size.y * size.z);
    if (n_threads_ < 1 || n_threads_ > 1024)
        throw EmulationError("a block of " + std::to_string(n_threads_) + " threads");
    while (static_cast<int>(threads_.size()) < n_threads_) threads_.push_back(std::make_unique<Thread>());
    warps_.assign(n_warps(), {});
    for (int i = 0; i < n_threads_; ++i) {
        Thread& thread = *threads_[i];
        const auto number = static_cast<unsigned>(i);
        thread.index = {number % size.x, number / size.x % size.y, number / size.x / size.y};
        thread.number = i;
        warps_[i / kLanes].exists |= 1u << i % kLanes;
        thread.state = State::ready;
        thread.groups.assign(1, {});
        thread.n_due = 0;
        thread.fiber.start(run_thread, this);
    }
    // A block of its own each time, so that AddressSanitizer sees what is beyond its end.
    shared_.reset(static_cast<unsigned char*>(
        ::operator new[](std::max<size_t>(n_shared_bytes, 1), std::align_val_t{kSharedAlignment})));
    std::fill_n(shared_.get(), n_shared_bytes, static_cast<unsigned char>(0xff));
    poison_static_shared();
    reset_memory_barriers();
}

void Block::run(dim3 size, size_t n_shared_bytes, Order order, std::mt19937& random,
                const std::function<void()>& kernel) {
    prepare(size, n_shared_bytes);
    kernel_ = &kernel;
    error_ = nullptr;
    is_aborted_ = false;
    running_block = this;
    release(&begin_key_);
    try {
        schedule(order, random);
        if (!reset_memory_barriers()) fail("bulk copies that no barrier_wait waited for", {"the end", "", 0});
    } catch (...) {
        error_ = std::current_exception();
        abort();
    }
    running_block = nullptr;
    acquire(&end_key_);
    if (error_) std::rethrow_exception(error_);
}

// Ends the threads that wait or have not begun.
void Block::abort() {
    is_aborted_ = true;
    for (int i = 0; i < n_threads_; ++i) {
        running_ = threads_[i].get();
        if (running_->state != State::done) running_->fiber.resume();
    }
}

void Block::run_thread(void* argument) {
    Block& block = *static_cast<Block*>(argument);
    acquire(&block.begin_key_);
    try {
        if (block.is_aborted_) throw Aborted();
        (*block.kernel_)();
        size_t n_pending = 0;
        for (const std::vector<Copy>& group : block.running_->groups) n_pending += group.size();
        if (n_pending) fail("asynchronous copies that no copy_async_wait waited for", {"the end", "", 0});
    } catch (const Aborted&) {
    } catch (...) {
        block.error_ = std::current_exception();
    }
    release(&block.end_key_);
    block.running_->state = State::done;
    block.warps_[block.running_->number / kLanes].ended |= 1u << block.running_->number % kLanes;
}

// Lets one warp after the other run as far as it can: in the order of their numbers, the reverse, or any warp
// after each pass over its lanes.
void Block::schedule(Order order, std::mt19937& random) {
    std::vector<int> warps(n_warps());
    std::iota(warps.begin(), warps.end(), 0);
    if (order == Order::backward) std::reverse(warps.begin(), warps.end());
    for (;;) {
        bool any = false;
        if (order == Order::random) std::shuffle(warps.begin(), warps.end(), random);
        for (const int warp : warps) {
            while (pass(warp, order, random)) {
                any = true;
                if (order == Order::random) break;
            }
        }
        if (any) continue;
        if (std::all_of(threads_.begin(), threads_.begin() + n_threads_,
                        [](const auto& thread) { return thread->state == State::done; }))
            return;
        open_barrier();
    }
}

// Runs each ready lane until it waits; false if none was ready.
bool Block::pass(int warp, Order order, std::mt19937& random) {
    int lanes[kLanes];
    std::iota(lanes, lanes + kLanes, 0);
    if (order == Order::backward) std::reverse(lanes, lanes + kLanes);
    if (order == Order::random) std::shuffle(lanes, lanes + kLanes, random);
    bool any = false;
    for (const int lane : lanes) {
        const int number = warp * kLanes + lane;
        if (number >= n_threads_ || threads_[number]->state != State::ready) continue;
        any = true;
        running_ = threads_[number].get();
        threadIdx = running_->index;
        running_->fiber.resume();
        if (error_) std::rethrow_exception(error_);
        throw_if_raced();
    }
    return any;
}

// No thread can go on: they all wait at the same barrier, or for ever.
void Block::open_barrier() {
    const auto begin = threads_.begin(), end = begin + n_threads_;
    const auto in_state = [&](State state) {
        const auto found =
            std::find_if(begin, end, [&](const auto& thread) { return thread->state == state; });
        return found == end ? nullptr : found->get();
    };
    if (const Thread* thread = in_state(State::at_memory_barrier)) {
        threadIdx = thread->index;
        fail("deadlock: a wait for arrivals that never come", thread->site);
    }
    if (Thread* thread = in_state(State::at_collective)) fail_waiting(*thread);
    Thread& first = *in_state(State::at_barrier);
    threadIdx = first.index;
    // The device lets the others pass, but a barrier that only some threads reach is rarely meant.
    if (const Thread* ended = in_state(State::done))
        fail("a barrier while thread " + text_of(ended->index) + " has ended", first.site);
    for (auto thread = begin; thread != end; ++thread) {
        if (!same_line((*thread)->site, first.site))
            fail("a barrier while thread " + text_of((*thread)->index) + " waits at another, " +
                     where((*thread)->site),
                 first.site);
    }
    for (auto thread = begin; thread != end; ++thread) (*thread)->state = State::ready;
}

// The thread waits in a collective for lanes that don't come.
void Block::fail_waiting(const Thread& thread) const {
    threadIdx = thread.index;
    uint32_t missing = thread.mask;
    for (int lane = 0; lane < kLanes; ++lane) {
        if (!(thread.mask >> lane & 1)) continue;
        const Thread& other = lane_of(thread, lane);
        if (other.state == State::at_collective && same_line(other.site, thread.site))
            missing &= ~(1u << lane);
    }
    fail("deadlock: lanes " + hex(missing) + " of the mask " + hex(thread.mask) + " never arrive",
         thread.site);
}

void Block::wait(State state) {
    Thread& thread = *running_;
    thread.state = state;
    thread.fiber.suspend();
    if (is_aborted_) throw Aborted();
}

void Block::barrier(const Site& site) {
    release(&barrier_key_);
    running_->site = site;
    wait(State::at_barrier);
    acquire(&barrier_key_);
}

void Block::wait_for_memory_barrier(const void* address, const Site& site) {
    running_->site = site;
    running_->memory_barrier = address;
    wait(State::at_memory_barrier);
}

void Block::wake(const void* address) {
    for (int i = 0; i < n_threads_; ++i) {
        Thread& thread = *threads_[i];
        if (thread.state == State::at_memory_barrier && thread.memory_barrier == address)
            thread.state = State::ready;
    }
}

// Throws unless the other lane of own's mask waits at the same collective, with the same mask.
void Block::require_same(const Thread& own, const Thread& other) const {
    const std::string lane =
        "lane " + std::to_string(other.number % kLanes) + " of the mask " + hex(own.mask);
    if (other.state == State::done) fail(std::string(own.what) + ": " + lane + " has ended", own.site);
    if (!same_line(other.site, own.site) || other.combine != own.combine)
        fail(std::string(own.what) + " while " + lane + " is at " + where(other.site), own.site);
    if (other.mask != own.mask)
        fail(std::string(own.what) + ": " + lane + " has another mask: " + hex(other.mask), own.site);
}

void Block::collective(const Collective& called, Words& words, bool orders_memory) {
    Thread& own = *running_;
    static_cast<Collective&>(own) = called;
    own.words = words;
    Warp& warp = warps_[own.number / kLanes];
    const uint32_t mask = own.mask, bit = 1u << own.number % kLanes;
    if (!(mask & bit))
        fail(std::string(own.what) + ": the mask " + hex(mask) + " lacks the lane that calls", own.site);
    if (mask & ~warp.exists)
        fail(std::string(own.what) + ": the mask " + hex(mask) + " has lanes beyond the block", own.site);
    if (const uint32_t ended = mask & warp.ended) require_same(own, lane_of(own, __builtin_ctz(ended)));
    char* key = &warp.keys[__builtin_ctz(mask)];
    if (orders_memory) release(key);
    warp.waiting |= bit;
    if ((warp.waiting & mask) == mask) {
        complete(own);
    } else {
        wait(State::at_collective);
    }
    if (orders_memory) acquire(key);
    words = own.words;
}

// The last lane of a mask has arrived.
void Block::complete(const Thread& last) {
    Words given[kLanes], got[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
        if (!(last.mask >> lane & 1)) continue;
        const Thread& other = lane_of(last, lane);
        if (other.mask != last.mask || other.combine != last.combine || !same_line(other.site, last.site))
            require_same(last, other);
        given[lane] = got[lane] = other.words;
    }
    if (last.combine) last.combine(given, got, last.mask);
    for (int lane = 0; lane < kLanes; ++lane) {
        if (!(last.mask >> lane & 1)) continue;
        Thread& thread = lane_of(last, lane);
        thread.words = got[lane];
        thread.state = State::ready;
    }
    warps_[last.number / kLanes].waiting &= ~last.mask;
}

Block& block() {
    if (!running_block) throw EmulationError("an intrinsic outside emulate()");
    return *running_block;
}

// Numbers of the blocks in the order in which they run.
std::vector<unsigned> block_order(unsigned n, Order order, std::mt19937& random) {
    std::vector<unsigned> numbers(n);
    std::iota(numbers.begin(), numbers.end(), 0u);
    if (order == Order::backward) std::reverse(numbers.begin(), numbers.end());
    if (order == Order::random) std::shuffle(numbers.begin(), numbers.end(), random);
    return numbers;
}

}  // namespace

void emulate(dim3 grid, dim3 size, size_t n_shared_bytes, Order order, const std::function<void()>& kernel) {
    static Block block;  // its fibers serve all kernels
    std::mt19937 random(1);
    gridDim = grid;
    blockDim = size;
    for (const unsigned i : block_order(grid.x * grid.y * grid.z, order, random)) {
        blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
        block.run(size, n_shared_bytes, order, random, kernel);
    }
}

void fail(const std::string& what, const Site& site) {
    throw EmulationError(where(site) + ", block " + text_of(blockIdx) + ", thread " + text_of(threadIdx) +
                         ": " + what);
}

void block_barrier(const Site& site) {
    if (!is_mutated(Fault::no_barrier, site)) block().barrier(site);
}

void inner_block_barrier(const Site& site) { block().barrier(site); }

void warp_collective(const char* what, uint32_t mask, Words& words, Combine combine, bool orders_memory,
                     const Site& site) {
    if (!combine && is_mutated(Fault::no_barrier, site)) return;
    if (is_mutated(Fault::mask_too_small, site)) mask &= ~(1u << (31 - __builtin_clz(mask | 1u)));
    block().collective({what, mask, combine, site}, words, orders_memory);
}

void wait_for_memory_barrier(const void* address, const Site& site) {
    block().wait_for_memory_barrier(address, site);
}

void wake_waiting(const void* address) { block().wake(address); }

void fail_in_collective(const std::string& what) { fail(what, block().running().site); }

unsigned char* block_shared_memory() { return block().shared(); }

void add_copy(const Copy& copy) {
    const Unchecked unchecked;
    block().running().groups.back().push_back(copy);
}

void commit_copies() {
    const Unchecked unchecked;
    block().running().groups.emplace_back();
}

void begin_wait(int n_left, const Site& site) {
    Thread& thread = block().running();
    const size_t n_committed = thread.groups.size() - 1;
    const size_t n_kept = static_cast<size_t>(n_left) + (is_mutated(Fault::late_copies, site) ? 1 : 0);
    thread.n_due = n_committed > n_kept ? n_committed - n_kept : 0;
}

bool take_copy(Copy& copy) {
    const Unchecked unchecked;
    Thread& thread = block().running();
    while (thread.n_due > 0) {
        std::vector<Copy>& group = thread.groups.front();
        if (!group.empty()) {
            copy = group.back();
            group.pop_back();
            return true;
        }
        thread.groups.pop_front();
        --thread.n_due;
    }
    return false;
}

}  // namespace pydiffusion::emulation
