// Attention of single tokens, each to its own sequence: this step's last tokens.
//
// A sequence's keys are divided among the blocks of the grid (splits) and their four warps, 16 keys at a time. All query
// heads that share a head of keys are the rows of one product, so keys and values are read once. Each block leaves a
// part: for each head the sum of weighted values, the largest score and the sum of weights; `join_parts` joins them.
#include <pool.cuh>

struct AttendDecode {
    const bf16* qkv;
    float* parts;  // for each row and head `splits` times head_dim + 2 numbers
    bf16* out;
    const u32* rows;  // which rows of the step
    const u32* positions;
    const u32* table_starts;
    Kv kv;
    u32 heads;
    u32 kv_heads;
    float scale;  // of scores, times log2(e)
    u32 splits;
};

#define TILE 16
#define STAGES 3
#define WARPS 4

template <int HEAD_DIM> __device__ __forceinline__ void attend_decode(const AttendDecode& p) {
    SHARED_BYTES(bytes);
    const u32 kv_head = blockIdx.x, row = p.rows[blockIdx.y], split = blockIdx.z;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = p.heads / p.kv_heads;
    const u32 position = p.positions[row], table = p.table_starts[row];
    const u32 keys = position == NO_POSITION ? 0 : position + 1;
    const u32 tiles = (keys + TILE - 1) / TILE, first = split * WARPS + warp, step = p.splits * WARPS;
    const u32 stage_bytes = 2 * TILE * HEAD_DIM * 2;
    const shared_address mine = address_of(bytes) + warp * STAGES * stage_bytes;

    // Rows of the product are the group's heads; rows without a head are zero.
    u32 q[HEAD_DIM / 16][4];
    const bf16* queries = p.qkv + ((u64)row * (p.heads + 2 * p.kv_heads) + kv_head * group) * HEAD_DIM + lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            u32 head = lane / 4 + e % 2 * 8;
            q[k][e] = head < group ? *reinterpret_cast<const u32*>(queries + head * HEAD_DIM + k * 16 + e / 2 * 8) : 0;
        }

    auto fetch = [&](u32 tile, u32 stage) {
        if (tile < tiles) {
            const bf16* from = key_of(p.kv, table, tile * TILE) + kv_head * HEAD_DIM;
            shared_address to = mine + stage * stage_bytes;
#pragma unroll
            for (u32 i = lane; i < TILE * HEAD_DIM / 8; i += 32) {
                u32 key = i / (HEAD_DIM / 8), piece = i % (HEAD_DIM / 8);
                bool valid = tile * TILE + key < keys;
                const bf16* place = from + (u64)(valid ? key : 0) * p.kv.width + piece * 8;
                copy_begin(to + swizzled<HEAD_DIM>(key, piece), place, valid);
                copy_begin(to + stage_bytes / 2 + swizzled<HEAD_DIM>(key, piece), place + key_to_value(p.kv), valid);
            }
        }
        copy_group();
    };

    float out[HEAD_DIM / 8][4] = {}, top[2] = {-1e30f, -1e30f}, sum[2] = {};
    for (u32 stage = 0; stage + 1 < STAGES; stage++) fetch(first + stage * step, stage);
    u32 stage = 0;
    for (u32 tile = first; tile < tiles; tile += step) {
        copy_wait<STAGES - 2>();
        sync_warp();
        const shared_address k_tile = mine + stage * stage_bytes, v_tile = k_tile + stage_bytes / 2;
        float score[2][4] = {};
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) {
            u32 b[4];
            load_matrices(b, k_tile + swizzled<HEAD_DIM>(lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
            multiply_add(score[0], q[k], b[0], b[1]);
            multiply_add(score[1], q[k], b[2], b[3]);
        }
        float highest[2] = {top[0], top[1]};
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                bool valid = tile * TILE + n * 8 + lane % 4 * 2 + e % 2 < keys;
                score[n][e] = valid ? score[n][e] * p.scale : -INFINITY;
                highest[e / 2] = fmaxf(highest[e / 2], score[n][e]);
            }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            highest[half] = fmaxf(highest[half], shuffle_xor(highest[half], 1));
            highest[half] = fmaxf(highest[half], shuffle_xor(highest[half], 2));
            float shrink = exp2_fast(top[half] - highest[half]);
            top[half] = highest[half];
            sum[half] *= shrink;
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; n++) out[n][half * 2] *= shrink, out[n][half * 2 + 1] *= shrink;
        }
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                score[n][e] = exp2_fast(score[n][e] - top[e / 2]);
                sum[e / 2] += score[n][e];
            }
        const u32 weight[4] = {narrow_pair(score[0][0], score[0][1]), narrow_pair(score[0][2], score[0][3]),
                               narrow_pair(score[1][0], score[1][1]), narrow_pair(score[1][2], score[1][3])};
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n += 2) {
            u32 v[4];
            load_matrices_transposed(v, v_tile + swizzled<HEAD_DIM>(lane % 16, n + lane / 16));
            multiply_add(out[n], weight, v[0], v[1]);
            multiply_add(out[n + 1], weight, v[2], v[3]);
        }
        // The stage read before this one is free: all threads of the warp are past it.
        fetch(tile + (STAGES - 1) * step, (stage + STAGES - 1) % STAGES);
        stage = (stage + 1) % STAGES;
    }
    copy_wait<0>();
    __syncthreads();

    // The four warps' sums, joined through shared memory: for each warp 16 heads of HEAD_DIM + 2 numbers.
    float* joined = reinterpret_cast<float*>(bytes);
    const u32 part = HEAD_DIM + 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        sum[half] += shuffle_xor(sum[half], 1);
        sum[half] += shuffle_xor(sum[half], 2);
        float* to = joined + (warp * 16 + lane / 4 + half * 8) * part;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++) {
            to[n * 8 + lane % 4 * 2] = out[n][half * 2];
            to[n * 8 + lane % 4 * 2 + 1] = out[n][half * 2 + 1];
        }
        if (lane % 4 == 0) to[HEAD_DIM] = top[half], to[HEAD_DIM + 1] = sum[half];
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < group * HEAD_DIM; i += WARPS * 32) {
        u32 head = i / HEAD_DIM, element = i % HEAD_DIM;
        float best = -1e30f, value = 0.f, total = 0.f;
        for (u32 w = 0; w < WARPS; w++) best = fmaxf(best, joined[(w * 16 + head) * part + HEAD_DIM]);
        for (u32 w = 0; w < WARPS; w++) {
            const float* from = joined + (w * 16 + head) * part;
            float share = exp2_fast(from[HEAD_DIM] - best);
            value += share * from[element], total += share * from[HEAD_DIM + 1];
        }
        float* to = p.parts + (((u64)blockIdx.y * p.heads + kv_head * group + head) * p.splits + split) * part;
        to[element] = value;
        if (element == 0) to[HEAD_DIM] = best, to[HEAD_DIM + 1] = total;
    }
}

// Blocks (heads of keys, rows, splits) of 128 threads; shared memory: 384 bytes for each element of a head, times two.
extern "C" __global__ void __launch_bounds__(128) attend_decode_64(const AttendDecode p) { attend_decode<64>(p); }
extern "C" __global__ void __launch_bounds__(128) attend_decode_128(const AttendDecode p) { attend_decode<128>(p); }

// Blocks (heads, rows), a thread for each element of a head.
extern "C" __global__ void join_parts(const AttendDecode p) {
    const u32 head = blockIdx.x, row = p.rows[blockIdx.y], element = threadIdx.x, head_dim = blockDim.x;
    const float* from = p.parts + ((u64)blockIdx.y * p.heads + head) * p.splits * (head_dim + 2);
    float best = -1e30f, value = 0.f, total = 0.f;
    for (u32 i = 0; i < p.splits; i++) best = fmaxf(best, from[i * (head_dim + 2) + head_dim]);
    for (u32 i = 0; i < p.splits; i++) {
        const float* part = from + i * (head_dim + 2);
        float share = exp2_fast(part[head_dim] - best);
        value += share * part[element], total += share * part[head_dim + 1];
    }
    // A row that only fills up the batch attends to nothing.
    p.out[((u64)row * p.heads + head) * head_dim + element] = narrow(total > 0.f ? value / total : 0.f);
}
