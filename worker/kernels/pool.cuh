// Where the KV of a token lies.
//
//   pool:   block 0 | block 1 | ..                    one every `stride` elements
//   block:  layer 0: K, V | layer 1: K, V | ..
//   K or V: token 0: head 0, head 1, .. | token 1: .. each head HEAD_DIM bf16
#pragma once
#include <device.cuh>

// The pool, and the tables of blocks of the sequences of a step, one behind the other.
struct Kv {
    bf16* base;
    const u32* tables;
    u64 stride;       // elements from one block to the next
    u32 block_shift;  // tokens of a block: 1 << block_shift
    u32 width;        // elements of one token's K (or V) of a layer
    u32 layer;
    u32 unused;
};

// Position of a row that only fills up a batch.
#define NO_POSITION 0xffffffffu

// K of all heads of the token at `position` of the sequence whose table begins at `table`.
__device__ __forceinline__ bf16* key_of(const Kv& kv, u32 table, u32 position) {
    u32 per_block = 1u << kv.block_shift;
    u32 token = (kv.layer * 2 << kv.block_shift) + (position & (per_block - 1));
    return kv.base + kv.tables[table + (position >> kv.block_shift)] * kv.stride + (u64)token * kv.width;
}

// Elements from a token's K to its V.
__device__ __forceinline__ u64 key_to_value(const Kv& kv) { return (u64)kv.width << kv.block_shift; }

// Rows of HEAD_DIM elements in shared memory, with the pieces of 16 bytes of each row in an order of its own: so eight
// threads that read the same piece of eight rows do not read the same banks.
template <int HEAD_DIM> __device__ __forceinline__ u32 swizzled(u32 row, u32 piece) {
    return (row * (HEAD_DIM / 8) + (piece ^ (row & 7))) * 16;
}
