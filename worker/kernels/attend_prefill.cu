// Attention of many tokens of a sequence to it and to all before: part of a prompt.
//
// The scheme is FlashAttention-2's: a block has 128 queries of one head and goes over the keys 64 at a time, keeping a
// running maximum and sum for each query; scores and weights stay in registers. While one set of keys and values is
// multiplied, the next is on its way from the pool. Each of the four warps has 32 queries, so that what it reads from
// shared memory serves two products.
#include <pool.cuh>

// Queries of a block: `rows` rows from `row` on, the first at `position` of its sequence.
struct Tile {
    u32 row;
    u32 rows;
    u32 position;
    u32 table;
};

struct AttendPrefill {
    const bf16* qkv;  // rows of queries, keys, values; queries are rotated
    bf16* out;        // rows of all heads
    const Tile* tiles;
    Kv kv;
    u32 heads;
    u32 kv_heads;
    float scale;  // of scores, times log2(e)
    u32 unused;
};

#define QUERIES 128
#define KEYS 64

template <int HEAD_DIM> struct PrefillMemory {
    static const u32 set = KEYS * HEAD_DIM * 2;                   // bytes of 64 keys, or values
    static const u32 keys = QUERIES * HEAD_DIM * 2;               // two sets of keys, behind the queries
    static const u32 values = keys + 2 * set;                     // two sets of values
};

// Begins to fetch the `index`th 64 keys and values; behind `end` there are zeros.
template <int HEAD_DIM>
__device__ __forceinline__ void fetch(const AttendPrefill& p, shared_address memory, u32 table, u32 kv_head, u32 index, u32 end) {
    const u32 pieces = HEAD_DIM / 8, piece = threadIdx.x % pieces;
    const shared_address keys = memory + PrefillMemory<HEAD_DIM>::keys + index % 2 * PrefillMemory<HEAD_DIM>::set;
    const shared_address values = memory + PrefillMemory<HEAD_DIM>::values + index % 2 * PrefillMemory<HEAD_DIM>::set;
#pragma unroll
    for (u32 group = 0; group < KEYS; group += 16) {
        // 16 keys from a multiple of 16 on lie in one block, one behind the other.
        u32 base = index * KEYS + group;
        const bf16* from = key_of(p.kv, table, base < end ? base : 0) + kv_head * HEAD_DIM + piece * 8;
#pragma unroll
        for (u32 row = threadIdx.x / pieces; row < 16; row += 128 / pieces) {
            bool valid = base + row < end;
            const bf16* key = from + (valid ? row * p.kv.width : 0);
            copy_begin(keys + swizzled<HEAD_DIM>(group + row, piece), key, valid);
            copy_begin(values + swizzled<HEAD_DIM>(group + row, piece), key + key_to_value(p.kv), valid);
        }
    }
}

template <int HEAD_DIM> __device__ __forceinline__ void attend_prefill(const AttendPrefill& p) {
    SHARED_BYTES(bytes);
    shared_address memory = address_of(bytes);
    const Tile tile = p.tiles[blockIdx.y];
    const u32 head = blockIdx.x, kv_head = head / (p.heads / p.kv_heads);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 pieces = HEAD_DIM / 8, width = (p.heads + 2 * p.kv_heads) * HEAD_DIM;
    const u32 end = tile.position + tile.rows, sets = (end + KEYS - 1) / KEYS;

    for (u32 i = threadIdx.x; i < QUERIES * pieces; i += 128) {
        u32 row = i / pieces, piece = i % pieces;
        bool valid = row < tile.rows;
        const bf16* from = p.qkv + (u64)(tile.row + (valid ? row : 0)) * width + head * HEAD_DIM + piece * 8;
        copy_begin(memory + swizzled<HEAD_DIM>(row, piece), from, valid);
    }
    fetch<HEAD_DIM>(p, memory, tile.table, kv_head, 0, end);
    copy_group();

    // Of this thread: rows lane / 4 + {0, 8, 16, 24} of the warp's 32, which are halves 0 and 1 of bands 0 and 1.
    float out[2][HEAD_DIM / 8][4] = {}, top[2][2], sum[2][2] = {};
    for (int band = 0; band < 2; band++) top[band][0] = top[band][1] = -1e30f;
    const u32 first = tile.position + warp * 32;  // position of the warp's first query

    for (u32 index = 0; index < sets; index++) {
        copy_wait<0>();
        // All threads' copies are there, and nobody reads the set before this one any more.
        __syncthreads();
        if (index + 1 < sets) fetch<HEAD_DIM>(p, memory, tile.table, kv_head, index + 1, end);
        copy_group();
        const u32 base = index * KEYS;
        // Sets that lie behind all queries of the warp have nothing for it.
        if (base <= first + 31) {
            const shared_address keys = memory + PrefillMemory<HEAD_DIM>::keys + index % 2 * PrefillMemory<HEAD_DIM>::set;
            const shared_address values = memory + PrefillMemory<HEAD_DIM>::values + index % 2 * PrefillMemory<HEAD_DIM>::set;
            float score[2][KEYS / 8][4] = {};
#pragma unroll
            for (int step = 0; step < HEAD_DIM / 16; step++) {
                u32 q[2][4];
#pragma unroll
                for (int band = 0; band < 2; band++)
                    load_matrices(q[band], memory + swizzled<HEAD_DIM>(warp * 32 + band * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
                for (int pair = 0; pair < KEYS / 16; pair++) {
                    u32 k[4];  // 16 keys: two matrices of the first eight, two of the others
                    load_matrices(k, keys + swizzled<HEAD_DIM>(pair * 16 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
#pragma unroll
                    for (int band = 0; band < 2; band++) {
                        multiply_add(score[band][pair * 2], q[band], k[0], k[1]);
                        multiply_add(score[band][pair * 2 + 1], q[band], k[2], k[3]);
                    }
                }
            }
            const bool masked = base + KEYS - 1 > first;
#pragma unroll
            for (int band = 0; band < 2; band++) {
                float highest[2] = {top[band][0], top[band][1]};
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        u32 key = base + n * 8 + lane % 4 * 2 + e % 2, query = first + band * 16 + lane / 4 + e / 2 * 8;
                        if (masked && key > query) score[band][n][e] = -INFINITY;
                        highest[e / 2] = fmaxf(highest[e / 2], score[band][n][e]);
                    }
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    highest[half] = fmaxf(highest[half], shuffle_xor(highest[half], 1));
                    highest[half] = fmaxf(highest[half], shuffle_xor(highest[half], 2));
                    float shrink = exp2_fast((top[band][half] - highest[half]) * p.scale);
                    top[band][half] = highest[half];
                    highest[half] *= p.scale;
                    sum[band][half] *= shrink;
#pragma unroll
                    for (int n = 0; n < HEAD_DIM / 8; n++) out[band][n][half * 2] *= shrink, out[band][n][half * 2 + 1] *= shrink;
                }
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        score[band][n][e] = exp2_fast(score[band][n][e] * p.scale - highest[e / 2]);
                        sum[band][e / 2] += score[band][n][e];
                    }
            }
#pragma unroll
            for (int step = 0; step < KEYS / 16; step++) {
                u32 weight[2][4];
#pragma unroll
                for (int band = 0; band < 2; band++) {
                    const float(&a)[4] = score[band][step * 2];
                    const float(&b)[4] = score[band][step * 2 + 1];
                    weight[band][0] = narrow_pair(a[0], a[1]), weight[band][1] = narrow_pair(a[2], a[3]);
                    weight[band][2] = narrow_pair(b[0], b[1]), weight[band][3] = narrow_pair(b[2], b[3]);
                }
#pragma unroll
                for (int n = 0; n < HEAD_DIM / 8; n += 2) {
                    u32 v[4];
                    load_matrices_transposed(v, values + swizzled<HEAD_DIM>(step * 16 + lane % 16, n + lane / 16));
#pragma unroll
                    for (int band = 0; band < 2; band++) {
                        multiply_add(out[band][n], weight[band], v[0], v[1]);
                        multiply_add(out[band][n + 1], weight[band], v[2], v[3]);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int band = 0; band < 2; band++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = sum[band][half];
            total += shuffle_xor(total, 1);
            total += shuffle_xor(total, 2);
            u32 row = warp * 32 + band * 16 + half * 8 + lane / 4;
            if (row >= tile.rows) continue;
            bf16* to = p.out + ((u64)(tile.row + row) * p.heads + head) * HEAD_DIM + lane % 4 * 2;
            float factor = 1.f / total;
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; n++)
                *reinterpret_cast<u32*>(to + n * 8) = narrow_pair(out[band][n][half * 2] * factor, out[band][n][half * 2 + 1] * factor);
        }
}

// Blocks (heads, tiles) of 128 threads, the heads that share keys one beside the other; shared memory: 384 bytes for
// each element of a head, times two.
extern "C" __global__ void __launch_bounds__(128) attend_prefill_64(const AttendPrefill p) { attend_prefill<64>(p); }
extern "C" __global__ void __launch_bounds__(128) attend_prefill_128(const AttendPrefill p) { attend_prefill<128>(p); }
