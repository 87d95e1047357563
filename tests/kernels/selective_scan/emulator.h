// CUDA on the CPU, as far as the selective scan needs it: one block at a time, its threads as fibers of one thread, which
// run until a barrier. What is copied asynchronously is copied at once. See emulated.py.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index { int x; };
struct Barrier { int waiting, round; };
constexpr int MAX_THREADS = 1024, STACK_BYTES = 1 << 16;

static Index indices[MAX_THREADS], blockIdx;
static ucontext_t fibers[MAX_THREADS], scheduler;
static bool finished[MAX_THREADS];
static int current, thread_count;
static Barrier block_barrier, warp_barriers[MAX_THREADS / 32], named_barriers[16];
static float exchanged[MAX_THREADS];
static char* block_memory;
static long long* kernel_arguments;
#define threadIdx (indices[current])

static void arrive(Barrier& barrier, int threads) {
    if (++barrier.waiting == threads) {
        barrier.waiting = 0;
        ++barrier.round;
    }
}
static void await(Barrier& barrier, int threads) {
    const int round = barrier.round;
    arrive(barrier, threads);
    while (barrier.round == round) swapcontext(&fibers[current], &scheduler);
}
static void __syncthreads() { await(block_barrier, thread_count); }
static void __syncwarp() { await(warp_barriers[current / 32], 32); }
static float __shfl_xor_sync(unsigned, float value, int mask) {
    exchanged[current] = value;
    __syncwarp();
    const float found = exchanged[current ^ mask];
    __syncwarp();
    return found;
}
static float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
static int atomicAdd(int* to, int value) {
    const int before = *to;
    *to += value;
    return before;
}
static void __threadfence() {}
static void __nanosleep(int) {}

static void launch_blocks(void (*fiber)(), int blocks, int threads, int shared_bytes, long long* arguments) {
    std::vector<char> stacks(size_t(threads) * STACK_BYTES);
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, shared_bytes + 128)) abort();
    block_memory = static_cast<char*>(memory);
    kernel_arguments = arguments;
    thread_count = threads;
    std::vector<int> order(threads);
    std::iota(order.begin(), order.end(), 0);
    std::mt19937 random(0);
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        memset(memory, 0xff, shared_bytes);  // NaN: what is read before it is written shows
        block_barrier = Barrier{};
        for (Barrier& barrier : warp_barriers) barrier = Barrier{};
        for (Barrier& barrier : named_barriers) barrier = Barrier{};
        for (int t = 0; t < threads; ++t) {
            finished[t] = false;
            indices[t].x = t;
            getcontext(&fibers[t]);
            fibers[t].uc_stack.ss_sp = &stacks[size_t(t) * STACK_BYTES];
            fibers[t].uc_stack.ss_size = STACK_BYTES;
            fibers[t].uc_link = &scheduler;
            makecontext(&fibers[t], fiber, 0);
        }
        for (bool running = true; running;) {
            running = false;
            std::shuffle(order.begin(), order.end(), random);  // so that a barrier that is missing shows
            for (int thread : order)
                if (current = thread; !finished[current]) {
                    running = true;
                    swapcontext(&scheduler, &fibers[current]);
                }
        }
    }
    free(memory);
}
