// What is done for each token by itself, between the matrix products.
#include <pool.cuh>

// Sum over a block of up to 1,024 threads, the same in each of them.
__device__ __forceinline__ float block_sum(float v) {
    __shared__ float of_warp[32];
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (int mask = 16; mask; mask /= 2) v += shuffle_xor(v, mask);
    if (lane == 0) of_warp[warp] = v;
    __syncthreads();
    v = lane < warps ? of_warp[lane] : 0.f;
    for (int mask = 16; mask; mask /= 2) v += shuffle_xor(v, mask);
    return v;
}

struct Embed {
    const u32* tokens;
    const bf16* table;
    float* hidden;
    u32 size;
    u32 unused;
};

// One block for each row: hidden = the token's row of the table.
extern "C" __global__ void embed(const Embed p) {
    const bf16* from = p.table + (u64)p.tokens[blockIdx.x] * p.size;
    float* to = p.hidden + (u64)blockIdx.x * p.size;
    for (u32 i = threadIdx.x; i < p.size; i += blockDim.x) to[i] = widen(from[i]);
}

struct Normalize {
    const float* hidden;
    const bf16* weight;
    bf16* out;
    const u32* rows;  // which rows are wanted; null: all
    u32 size;
    float epsilon;
};

// One block for each row: out = hidden / root mean square * weight.
extern "C" __global__ void normalize(const Normalize p) {
    u64 row = p.rows ? p.rows[blockIdx.x] : blockIdx.x;
    const float4* from = reinterpret_cast<const float4*>(p.hidden + row * p.size);
    const uint2* weights = reinterpret_cast<const uint2*>(p.weight);
    uint2* to = reinterpret_cast<uint2*>(p.out + (u64)blockIdx.x * p.size);
    float sum = 0.f;
    for (u32 i = threadIdx.x; i < p.size / 4; i += blockDim.x) {
        float4 v = from[i];
        sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    float scale = rsqrtf(block_sum(sum) / p.size + p.epsilon);
    for (u32 i = threadIdx.x; i < p.size / 4; i += blockDim.x) {
        float4 v = from[i];
        uint2 pairs = weights[i];
        const bf16* w = reinterpret_cast<const bf16*>(&pairs);
        to[i] = make_uint2(narrow_pair(v.x * scale * widen(w[0]), v.y * scale * widen(w[1])),
                           narrow_pair(v.z * scale * widen(w[2]), v.w * scale * widen(w[3])));
    }
}

struct RotateStore {
    bf16* qkv;  // rows of queries, keys, values
    const u32* positions;
    const u32* table_starts;
    const float* angles;  // for each position half a head of cosines, then of sines
    Kv kv;
    u32 heads;
    u32 kv_heads;
    u32 head_dim;
    u32 unused;
};

// One block for each row: queries are rotated where they are, keys on their way into the pool, values go there too.
extern "C" __global__ void rotate_store(const RotateStore p) {
    u32 position = p.positions[blockIdx.x], half = p.head_dim / 2;
    if (position == NO_POSITION) return;
    bf16* row = p.qkv + (u64)blockIdx.x * (p.heads + 2 * p.kv_heads) * p.head_dim;
    bf16* keys = key_of(p.kv, p.table_starts[blockIdx.x], position);
    const float* angles = p.angles + (u64)position * p.head_dim;
    // Four pairs at a time: elements i .. i + 4 of the head's first half with those of its second.
    u32 pieces = half / 4;
    for (u32 i = threadIdx.x; i < (p.heads + p.kv_heads) * pieces; i += blockDim.x) {
        u32 head = i / pieces, at = i % pieces * 4;
        bf16* from = row + head * p.head_dim + at;
        bf16* to = head < p.heads ? from : keys + (head - p.heads) * p.head_dim + at;
        uint2 first = *reinterpret_cast<uint2*>(from), second = *reinterpret_cast<uint2*>(from + half);
        const bf16* a = reinterpret_cast<const bf16*>(&first);
        const bf16* b = reinterpret_cast<const bf16*>(&second);
        float x[4], y[4];
        for (int e = 0; e < 4; e++) {
            float cosine = angles[at + e], sine = angles[half + at + e];
            x[e] = widen(a[e]) * cosine - widen(b[e]) * sine;
            y[e] = widen(b[e]) * cosine + widen(a[e]) * sine;
        }
        *reinterpret_cast<uint2*>(to) = make_uint2(narrow_pair(x[0], x[1]), narrow_pair(x[2], x[3]));
        *reinterpret_cast<uint2*>(to + half) = make_uint2(narrow_pair(y[0], y[1]), narrow_pair(y[2], y[3]));
    }
    const uint4* values = reinterpret_cast<const uint4*>(row + (p.heads + p.kv_heads) * p.head_dim);
    uint4* place = reinterpret_cast<uint4*>(keys + key_to_value(p.kv));
    for (u32 i = threadIdx.x; i < p.kv.width / 8; i += blockDim.x) place[i] = values[i];
}

struct Activate {
    const bf16* gate_up;  // rows of `size` gates, then as many factors
    bf16* out;
    u32 size;
    u32 unused;
};

// Blocks (pieces of a row, rows), eight elements a thread: out = silu(gate) * factor.
extern "C" __global__ void activate(const Activate p) {
    u32 i = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (i >= p.size) return;
    const bf16* from = p.gate_up + (u64)blockIdx.y * 2 * p.size + i;
    uint4 gates = *reinterpret_cast<const uint4*>(from), factors = *reinterpret_cast<const uint4*>(from + p.size);
    const bf16* g = reinterpret_cast<const bf16*>(&gates);
    const bf16* f = reinterpret_cast<const bf16*>(&factors);
    float v[8];
    for (int e = 0; e < 8; e++) {
        float gate = widen(g[e]);
        v[e] = gate / (1.f + exp2_fast(-1.4426950408889634f * gate)) * widen(f[e]);
    }
    *reinterpret_cast<uint4*>(p.out + (u64)blockIdx.y * p.size + i) =
        make_uint4(narrow_pair(v[0], v[1]), narrow_pair(v[2], v[3]), narrow_pair(v[4], v[5]), narrow_pair(v[6], v[7]));
}

struct Largest {
    const float* logits;
    u32* tokens;
    u32 row;     // elements from one row to the next
    u32 length;  // elements that count
};

// One block for each row: the token with the largest logit, the lowest of equal ones.
extern "C" __global__ void largest(const Largest p) {
    __shared__ float values[32];
    __shared__ u32 tokens[32];
    const float* from = p.logits + (u64)blockIdx.x * p.row;
    float best = -INFINITY;
    u32 token = 0xffffffffu;
    for (u32 i = threadIdx.x; i < p.length; i += blockDim.x) {
        float v = from[i];
        if (v > best) best = v, token = i;
    }
    u32 warps = blockDim.x / 32, lane = threadIdx.x % 32;
    // The second time, each thread of a warp has what a whole warp found.
    for (int round = 0; round < 2; round++) {
        for (int mask = 16; mask; mask /= 2) {
            float value = shuffle_xor(best, mask);
            u32 other = shuffle_xor(token, mask);
            if (value > best || (value == best && other < token)) best = value, token = other;
        }
        if (round == 0 && lane == 0) values[threadIdx.x / 32] = best, tokens[threadIdx.x / 32] = token;
        __syncthreads();
        if (round == 0) best = lane < warps ? values[lane] : -INFINITY, token = lane < warps ? tokens[lane] : 0xffffffffu;
    }
    if (threadIdx.x == 0) p.tokens[blockIdx.x] = token;
}

struct FillRandom {
    bf16* to;
    u64 count;
    u64 seed;
    float scale;
    u32 unused;
};

// Numbers in [-scale, scale), each a function of seed and index: the finalizer of splitmix64.
extern "C" __global__ void fill_random(const FillRandom p) {
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < p.count; i += (u64)gridDim.x * blockDim.x) {
        u64 z = p.seed + (i + 1) * 0x9e3779b97f4a7c15ull;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        z ^= z >> 31;
        p.to[i] = narrow(((float)(u32)(z >> 40) * (1.f / 8388608.f) - 1.f) * p.scale);
    }
}
