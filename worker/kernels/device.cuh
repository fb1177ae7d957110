// What the kernels need of the processor, by plain names. A second file of this name, in emulated/, has the same names
// for threads of a CPU, so that the kernels can be checked on a machine without a GPU.
//
// Everything here exists from compute capability 8.0 on.
#pragma once
#include <cuda_bf16.h>

typedef __nv_bfloat16 bf16;
typedef unsigned int u32;
typedef unsigned long long u64;
// An address within the memory that the threads of a block share.
typedef u32 shared_address;

// Declares the memory shared by a block; its size is given at the launch.
#define SHARED_BYTES(name) extern __shared__ __align__(128) unsigned char name[]

__device__ __forceinline__ shared_address address_of(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ float widen(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ bf16 narrow(float v) { return __float2bfloat16(v); }
// Two values as bf16, the first in the low half.
__device__ __forceinline__ u32 narrow_pair(float a, float b) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<u32*>(&pair);
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The value of the thread whose number within the warp differs in the bits of `mask`.
__device__ __forceinline__ float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
__device__ __forceinline__ u32 shuffle_xor(u32 v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// 16 bytes from global to shared memory, behind the thread's back; zeros when not `valid`.
__device__ __forceinline__ void copy_begin(shared_address to, const void* from, bool valid) {
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}
// Closes a group of copies of this thread.
__device__ __forceinline__ void copy_group() { asm volatile("cp.async.commit_group;"); }
// Waits until at most LEFT of this thread's groups are under way.
template <int LEFT> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT)); }

// Four 8 x 8 matrices of bf16 from shared memory: thread i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], shared_address row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row));
}
// The same, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], shared_address row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row));
}

// c += a * b on the tensor cores: a is 16 x 16, b 16 x 8, c 16 x 8. Thread i holds, with row = i / 4 and pair = i % 4:
//   a[0], a[2]: row `row`, columns 2 pair and 2 pair + 8 (and the next);  a[1], a[3]: the same of row + 8
//   b0, b1:     column `row`, rows 2 pair and 2 pair + 8 (and the next)
//   c[0], c[1]: row `row`, columns 2 pair and 2 pair + 1;                 c[2], c[3]: the same of row + 8
__device__ __forceinline__ void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
