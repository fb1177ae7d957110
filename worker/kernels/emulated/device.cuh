// The names of ../device.cuh for threads of a CPU: each thread of a block is a fiber, and the fibers take turns at every
// barrier. The products of the tensor cores are computed as their definition says, from the registers of all 32 threads
// of a warp. Addresses that the hardware would refuse end the program.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

typedef uint32_t u32;
typedef unsigned long long u64;
typedef uintptr_t shared_address;

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(threads)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct bf16 { uint16_t bits; };
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct float4 { float x, y, z, w; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
struct Index { u32 x, y, z; };

namespace emulated {

// What a warp's threads show each other.
struct Warp {
    u32 arrived = 0, round = 0;
    u32 words[32];
    uintptr_t rows[32];
    u32 a[32][4], b[32][2];
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Index thread;
    bool done = false;
};

struct Block {
    ucontext_t scheduler;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    u32 current = 0, arrived = 0, round = 0;
    std::function<void()> work;
    alignas(128) unsigned char shared[256 * 1024];
};

inline Block* block = nullptr;
inline Index block_index, block_size, grid_size;

inline void yield() { swapcontext(&block->fibers[block->current].context, &block->scheduler); }
inline void arrive(u32& arrived, u32& round, u32 all) {
    u32 mine = round;
    if (++arrived == all) {
        arrived = 0;
        round++;
    }
    while (round == mine) yield();
}
inline u32 lane() { return block->current % 32; }
inline Warp& warp() { return block->warps[block->current / 32]; }
inline void meet() { arrive(warp().arrived, warp().round, 32); }

inline void run_fiber() {
    block->work();
    block->fibers[block->current].done = true;
    yield();
}

inline void check(bool aligned, const char* what) {
    if (aligned) return;
    fprintf(stderr, "misaligned %s\n", what);
    exit(1);
}

// Runs `work` as each thread of each block of the grid, block after block.
inline void launch(Index grid, u32 threads, std::function<void()> work) {
    static Block only;
    block = &only;
    grid_size = grid;
    block_size = {threads, 1, 1};
    only.work = work;
    only.fibers.resize(threads);
    for (u32 z = 0; z < grid.z; z++)
        for (u32 y = 0; y < grid.y; y++)
            for (u32 x = 0; x < grid.x; x++) {
                block_index = {x, y, z};
                only.warps.assign((threads + 31) / 32, Warp());
                only.arrived = only.round = 0;
                // What a kernel does not write must not look like zeros.
                memset(only.shared, 0xff, sizeof only.shared);
                for (u32 i = 0; i < threads; i++) {
                    Fiber& fiber = only.fibers[i];
                    fiber.stack.resize(64 * 1024);
                    fiber.thread = {i, 0, 0};
                    fiber.done = false;
                    getcontext(&fiber.context);
                    fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
                    fiber.context.uc_link = nullptr;
                    makecontext(&fiber.context, run_fiber, 0);
                }
                for (bool left = true; left;) {
                    left = false;
                    for (u32 i = 0; i < threads; i++) {
                        if (only.fibers[i].done) continue;
                        only.current = i;
                        swapcontext(&only.scheduler, &only.fibers[i].context);
                        left = left || !only.fibers[i].done;
                    }
                }
            }
}

}  // namespace emulated

#define threadIdx (emulated::block->fibers[emulated::block->current].thread)
#define blockIdx emulated::block_index
#define blockDim emulated::block_size
#define gridDim emulated::grid_size
#define SHARED_BYTES(name) unsigned char* name = emulated::block->shared

inline shared_address address_of(const void* p) { return (uintptr_t)p; }
inline void __syncthreads() { emulated::arrive(emulated::block->arrived, emulated::block->round, blockDim.x); }
inline void sync_warp() { emulated::meet(); }

inline float widen(bf16 v) {
    u32 bits = (u32)v.bits << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline bf16 narrow(float v) {
    u32 bits;
    memcpy(&bits, &v, 4);
    if (v != v) return {(uint16_t)(bits >> 16 | 0x40)};
    return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline u32 narrow_pair(float a, float b) { return narrow(a).bits | (u32)narrow(b).bits << 16; }
inline float exp2_fast(float x) { return exp2f(x); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }

inline u32 shuffle_xor(u32 v, int mask) {
    emulated::warp().words[emulated::lane()] = v;
    emulated::meet();
    u32 other = emulated::warp().words[emulated::lane() ^ mask];
    emulated::meet();
    return other;
}
inline float shuffle_xor(float v, int mask) {
    u32 bits;
    memcpy(&bits, &v, 4);
    bits = shuffle_xor(bits, mask);
    memcpy(&v, &bits, 4);
    return v;
}

// Copies are done at once: an order that the kernel fails to wait for is not noticed here.
inline void copy_begin(shared_address to, const void* from, bool valid) {
    emulated::check(to % 16 == 0 && (uintptr_t)from % 16 == 0, "copy of 16 bytes");
    if (valid) memcpy((void*)to, from, 16);
    else memset((void*)to, 0, 16);
}
inline void copy_group() {}
template <int LEFT> inline void copy_wait() {}

inline void show_row(shared_address row) {
    emulated::check(row % 16 == 0, "row of a matrix");
    emulated::warp().rows[emulated::lane()] = row;
    emulated::meet();
}
inline void load_matrices(u32 (&r)[4], shared_address row) {
    show_row(row);
    u32 lane = emulated::lane();
    for (int i = 0; i < 4; i++) memcpy(&r[i], (void*)(emulated::warp().rows[i * 8 + lane / 4] + lane % 4 * 4), 4);
    emulated::meet();
}
inline void load_matrices_transposed(u32 (&r)[4], shared_address row) {
    show_row(row);
    u32 lane = emulated::lane();
    for (int i = 0; i < 4; i++) {
        const uintptr_t* rows = emulated::warp().rows + i * 8 + lane % 4 * 2;
        r[i] = *(uint16_t*)(rows[0] + lane / 4 * 2) | (u32) * (uint16_t*)(rows[1] + lane / 4 * 2) << 16;
    }
    emulated::meet();
}

inline float half_of(u32 pair, u32 index) { return widen({(uint16_t)(pair >> 16 * index)}); }
inline void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulated::Warp& warp = emulated::warp();
    u32 lane = emulated::lane();
    memcpy(warp.a[lane], a, 16);
    warp.b[lane][0] = b0, warp.b[lane][1] = b1;
    emulated::meet();
    for (u32 e = 0; e < 4; e++) {
        u32 row = lane / 4, column = lane % 4 * 2 + e % 2;
        for (u32 k = 0; k < 16; k++) {
            u32 pair = k % 8 / 2, right = k / 8;
            c[e] += half_of(warp.a[row * 4 + pair][right * 2 + e / 2], k % 2) *
                    half_of(warp.b[column * 4 + pair][right], k % 2);
        }
    }
    emulated::meet();
}
