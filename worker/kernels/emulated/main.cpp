// Runs the kernels on a CPU and compares them with plain arithmetic in f64. Built and run by the crate's tests:
//   c++ -std=c++20 -O2 -fno-strict-aliasing -I emulated -I . emulated/main.cpp -o check && ./check
#include "../llama.cu"

#include <algorithm>

using emulated::launch;

static u64 state = 1;
static float noise() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (float)(state >> 40) / 8388608.f - 1.f;
}
static std::vector<bf16> noise(size_t count, float scale = 1.f) {
    std::vector<bf16> v(count);
    for (bf16& x : v) x = narrow(noise() * scale);
    return v;
}

static int failed = 0;
// Every difference is within `share` of the largest value.
static void compare(const char* what, const std::vector<float>& got, const std::vector<double>& want, double share) {
    double worst = 0, largest = 0;
    bool finite = true;
    for (size_t i = 0; i < want.size(); i++) {
        finite = finite && std::isfinite(got[i]);
        worst = std::max(worst, std::fabs(got[i] - want[i]));
        largest = std::max(largest, std::fabs(want[i]));
    }
    bool good = finite && largest > 0 && worst <= share * largest;
    printf("%s %s: worst %.5f of %.3f\n", good ? "ok  " : "FAIL", what, worst, largest);
    failed += !good;
}
static std::vector<float> widened(const std::vector<bf16>& v) {
    std::vector<float> out;
    for (bf16 x : v) out.push_back(widen(x));
    return out;
}

// A sequence in a pool whose other bytes are NaN.
struct Sequence {
    u32 heads, kv_heads, head_dim, shift, layers = 2;
    std::vector<bf16> pool;
    std::vector<u32> tables;
    u32 start = 5;  // its table is not the first

    Sequence(u32 heads, u32 kv_heads, u32 head_dim, u32 shift, u32 tokens)
        : heads(heads), kv_heads(kv_heads), head_dim(head_dim), shift(shift) {
        u32 blocks = (tokens >> shift) + 1, all = blocks + 9;
        pool.assign((size_t)all * stride(), bf16{0x7fff});
        tables.assign(start, 0xffffffff);
        for (u32 i = 0; i < blocks; i++) tables.push_back((i * 7 + 3) % all);
    }
    // A little more than the block's bytes.
    u64 stride() const { return (u64)layers * 2 * kv_heads * head_dim << shift | 64; }
    Kv kv() { return {pool.data(), tables.data(), stride(), shift, kv_heads * head_dim, 1, 0}; }
    bf16* place(u32 position, u32 half) {
        u64 token = (((u64)1 * 2 + half) << shift) + position % (1u << shift);
        return &pool[tables[start + (position >> shift)] * stride() + token * kv_heads * head_dim];
    }
    void fill(u32 tokens) {
        for (u32 t = 0; t < tokens; t++)
            for (u32 half = 0; half < 2; half++)
                for (u32 i = 0; i < kv_heads * head_dim; i++) place(t, half)[i] = narrow(noise() * 2);
    }
    // One query head at `position`.
    void attend(const bf16* q, u32 head, u32 position, double* out) {
        std::vector<double> score(position + 1);
        u32 at = head / (heads / kv_heads) * head_dim;
        double top = -1e300, sum = 0;
        for (u32 j = 0; j <= position; j++) {
            for (u32 i = 0; i < head_dim; i++) score[j] += (double)widen(q[i]) * widen(place(j, 0)[at + i]);
            score[j] /= std::sqrt((double)head_dim);
            top = std::max(top, score[j]);
        }
        for (double& s : score) sum += s = std::exp(s - top);
        for (u32 i = 0; i < head_dim; i++) {
            out[i] = 0;
            for (u32 j = 0; j <= position; j++) out[i] += score[j] / sum * widen(place(j, 1)[at + i]);
        }
    }
    float scale() const { return 1.4426950408889634f / std::sqrt((float)head_dim); }
};

static void prefill(u32 heads, u32 kv_heads, u32 head_dim, u32 shift, u32 before, u32 count) {
    Sequence s(heads, kv_heads, head_dim, shift, before + count);
    s.fill(before + count);
    // Two rows of others stand before those of this sequence.
    u32 width = (heads + 2 * kv_heads) * head_dim, skipped = 2;
    std::vector<bf16> qkv = noise((size_t)(skipped + count) * width, 2), out((size_t)(skipped + count) * heads * head_dim);
    std::vector<Tile> tiles;
    for (u32 at = 0; at < count; at += QUERIES)
        tiles.push_back({skipped + at, std::min<u32>(QUERIES, count - at), before + at, s.start});
    AttendPrefill p = {qkv.data(), out.data(), tiles.data(), s.kv(), heads, kv_heads, s.scale(), 0};
    launch({heads, (u32)tiles.size(), 1}, 128, [&] { head_dim == 64 ? attend_prefill_64(p) : attend_prefill_128(p); });
    std::vector<double> want((size_t)count * heads * head_dim);
    for (u32 t = 0; t < count; t++)
        for (u32 h = 0; h < heads; h++)
            s.attend(&qkv[(size_t)(skipped + t) * width + h * head_dim], h, before + t, &want[((size_t)t * heads + h) * head_dim]);
    std::vector<float> got = widened(out);
    got.erase(got.begin(), got.begin() + (size_t)skipped * heads * head_dim);
    char name[99];
    snprintf(name, 99, "prefill %u/%u heads of %u, blocks of %u, %u behind %u", heads, kv_heads, head_dim, 1 << shift, count, before);
    compare(name, got, want, 0.01);
}

static void decode(u32 heads, u32 kv_heads, u32 head_dim, u32 shift, u32 position, u32 splits) {
    Sequence s(heads, kv_heads, head_dim, shift, position + 1);
    s.fill(position + 1);
    u32 width = (heads + 2 * kv_heads) * head_dim, part = head_dim + 2;
    std::vector<bf16> qkv = noise(3 * (size_t)width, 2), out(3 * (size_t)heads * head_dim);
    // Row 1 only fills up the batch.
    std::vector<u32> rows = {2, 1, 0}, positions = {position, NO_POSITION, position / 2}, starts = {s.start, 0, s.start};
    std::vector<float> parts(3 * (size_t)heads * splits * part, NAN);
    AttendDecode p = {qkv.data(), parts.data(), out.data(), rows.data(), positions.data(), starts.data(), s.kv(), heads, kv_heads, s.scale(), splits};
    launch({kv_heads, 3, splits}, 128, [&] { head_dim == 64 ? attend_decode_64(p) : attend_decode_128(p); });
    launch({heads, 3, 1}, head_dim, [&] { join_parts(p); });
    std::vector<double> want(out.size());
    for (u32 row : {0, 2})
        for (u32 h = 0; h < heads; h++)
            s.attend(&qkv[(size_t)row * width + h * head_dim], h, positions[row], &want[((size_t)row * heads + h) * head_dim]);
    char name[99];
    snprintf(name, 99, "decode %u/%u heads of %u, blocks of %u, position %u, %u splits", heads, kv_heads, head_dim, 1 << shift, position, splits);
    compare(name, widened(out), want, 0.01);
}

static void rotate(u32 heads, u32 kv_heads, u32 head_dim) {
    const u32 tokens = 21;
    Sequence s(heads, kv_heads, head_dim, 4, 40);
    u32 width = (heads + 2 * kv_heads) * head_dim, half = head_dim / 2;
    std::vector<bf16> qkv = noise((size_t)tokens * width), before = qkv;
    std::vector<float> angles(40 * head_dim), got;
    for (float& a : angles) a = noise();
    std::vector<u32> positions, starts(tokens, s.start);
    for (u32 t = 0; t < tokens; t++) positions.push_back(13 + t);
    positions[4] = NO_POSITION;
    RotateStore p = {qkv.data(), positions.data(), starts.data(), angles.data(), s.kv(), heads, kv_heads, head_dim, 0};
    launch({tokens, 1, 1}, 256, [&] { rotate_store(p); });
    std::vector<double> want;
    for (u32 t = 0; t < tokens; t++) {
        if (positions[t] == NO_POSITION) continue;
        for (u32 i = 0; i < width; i++) {
            u32 head = i / head_dim, at = i % head_dim;
            const bf16* from = &before[(size_t)t * width + head * head_dim];
            const float* angle = &angles[positions[t] * head_dim];
            double a = widen(from[at % half]), b = widen(from[at % half + half]), c = angle[at % half], d = angle[half + at % half];
            bool value = head >= heads + kv_heads;
            want.push_back(value ? widen(from[at]) : at < half ? a * c - b * d : b * c + a * d);
            u32 kv_at = i - heads * head_dim;
            if (head < heads) got.push_back(widen(qkv[(size_t)t * width + i]));
            else got.push_back(widen(s.place(positions[t], value)[value ? kv_at - kv_heads * head_dim : kv_at]));
        }
    }
    compare("rotate and store", got, want, 0.01);
    bool untouched = memcmp(&qkv[4 * (size_t)width], &before[4 * (size_t)width], width * 2) == 0;
    u32 written = 0;
    for (bf16 v : s.pool) written += v.bits != 0x7fff;
    bool exact = untouched && written == (tokens - 1) * 2 * kv_heads * head_dim;
    printf("%s rotate and store: nothing else is written\n", exact ? "ok  " : "FAIL");
    failed += !exact;
}

static void pointwise() {
    const u32 rows = 3, size = 704;
    std::vector<bf16> weight = noise(size), table = noise(50 * size), out(rows * size);
    std::vector<u32> tokens = {7, 49, 0}, wanted = {2, 0};
    std::vector<float> hidden(rows * size, NAN);
    launch({rows, 1, 1}, 128, [&] { embed({tokens.data(), table.data(), hidden.data(), size, 0}); });
    std::vector<double> want;
    for (u32 t : tokens)
        for (u32 i = 0; i < size; i++) want.push_back(widen(table[t * size + i]));
    compare("embed", hidden, want, 0);
    launch({2, 1, 1}, 256, [&] { normalize({hidden.data(), weight.data(), out.data(), wanted.data(), size, 1e-5f}); });
    want.clear();
    for (u32 row : wanted) {
        double sum = 0;
        for (u32 i = 0; i < size; i++) sum += (double)hidden[row * size + i] * hidden[row * size + i];
        for (u32 i = 0; i < size; i++) want.push_back(hidden[row * size + i] / std::sqrt(sum / size + 1e-5) * widen(weight[i]));
    }
    compare("normalize", widened(out), want, 0.01);
    std::vector<bf16> gate_up = noise(rows * 2 * size, 8), active(rows * size);
    launch({(size / 8 + 127) / 128, rows, 1}, 128, [&] { activate({gate_up.data(), active.data(), size, 0}); });
    want.clear();
    for (u32 row = 0; row < rows; row++)
        for (u32 i = 0; i < size; i++) {
            double g = widen(gate_up[row * 2 * size + i]);
            want.push_back(g / (1 + std::exp(-g)) * widen(gate_up[row * 2 * size + size + i]));
        }
    compare("activate", widened(active), want, 0.01);
    // Two equal largest ones, and a larger one that does not count.
    std::vector<float> logits(2 * 1000, -3.f);
    logits[333] = logits[777] = 2.f, logits[900] = 5.f, logits[1000] = -2.f, logits[1899] = 9.f;
    std::vector<u32> chosen(2);
    launch({2, 1, 1}, 1024, [&] { largest({logits.data(), chosen.data(), 1000, 899}); });
    bool right = chosen[0] == 333 && chosen[1] == 0;
    printf("%s largest: %u %u\n", right ? "ok  " : "FAIL", chosen[0], chosen[1]);
    failed += !right;
    std::vector<bf16> random(4);
    launch({1, 1, 1}, 32, [&] { fill_random({random.data(), 4, 42, 0.5f, 0}); });
    // The worker's own generator has the same example.
    const uint16_t example[4] = {0x3e77, 0xbeae, 0xbe63, 0xbe20};
    bool same = memcmp(random.data(), example, 8) == 0;
    printf("%s random: %04x %04x %04x %04x\n", same ? "ok  " : "FAIL", random[0].bits, random[1].bits, random[2].bits, random[3].bits);
    failed += !same;
}

int main() {
    pointwise();
    rotate(4, 2, 64);
    rotate(4, 1, 128);
    prefill(4, 2, 64, 4, 0, 70);
    prefill(4, 2, 64, 5, 37, 131);
    prefill(2, 1, 128, 5, 129, 30);
    prefill(1, 1, 128, 6, 200, 140);
    decode(4, 2, 64, 4, 0, 1);
    decode(4, 1, 128, 5, 300, 3);
    decode(16, 1, 64, 6, 517, 2);
    decode(3, 3, 128, 4, 47, 8);
    printf(failed ? "%d FAILED\n" : "all kernels agree\n", failed);
    return failed != 0;
}
