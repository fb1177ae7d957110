//! Attention of queries over the keys and values of their sequence, read from its blocks.
//!
//! Keys are taken in tiles of 16 positions counted from the sequence's first, one after the other, with a running
//! maximum and sum. Per query the arithmetic depends on its position alone: not on the block size (a multiple of 16), on
//! which other queries are computed with it, or on where its chunk begins.

use super::isa::dispatch;
use super::kv::{BlockId, KvMemory};
use super::lanes::{LANES, Lanes, exp, maximum, sum, turn_columns};

/// Consecutive queries of one sequence that share a head of keys.
pub(crate) struct Queries<'a> {
    pub(crate) kv: &'a KvMemory,
    pub(crate) blocks: &'a [BlockId],
    pub(crate) layer: usize,
    pub(crate) kv_head: usize,
    /// Query heads of each head of keys.
    pub(crate) group: usize,
    /// Position of the first query's token.
    pub(crate) first_position: usize,
    /// Number of tokens.
    pub(crate) tokens: usize,
    /// First token's query for the first head of the group; further heads follow directly.
    pub(crate) q: *const f32,
    /// Elements from one token's query to the next.
    pub(crate) q_stride: usize,
    /// First token's output for the first head of the group.
    pub(crate) out: *mut f32,
    /// Elements from one token's output to the next.
    pub(crate) out_stride: usize,
}

/// Buffers of one thread.
#[derive(Default)]
pub(crate) struct Scratch {
    q: Vec<f32>,
    /// Keys of a tile, 16 positions side by side for each element.
    k: Vec<f32>,
    /// The same as pairs of bf16, as they are turned.
    pairs: Vec<u32>,
    v: Vec<f32>,
    /// Scores, then weights: 16 per row.
    weights: Vec<f32>,
    maxima: Vec<f32>,
    sums: Vec<f32>,
    /// What a row's output so far is multiplied by because its maximum rose.
    rescale: Vec<f32>,
    out: Vec<f32>,
}

dispatch! {
    /// Computes the outputs of `queries`.
    ///
    /// # Safety
    /// The pointers must be valid for all tokens and the heads of the group, and nobody else may use the output or write
    /// the keys and values meanwhile.
    fn attend = attend_generic(queries: &Queries<'_>, scratch: &mut Scratch)
}

#[inline(always)]
unsafe fn attend_generic<L: Lanes>(queries: &Queries<'_>, scratch: &mut Scratch) {
    let head_dim = queries.kv.layout().head_dim;
    let rows = queries.tokens * queries.group;
    // SAFETY: the caller's pointers; the scratch is sized by `prepare`, before all else.
    unsafe {
        prepare(queries, scratch, rows, head_dim);
        let last = queries.first_position + queries.tokens - 1;
        for tile in 0..=last / LANES {
            let first_key = tile * LANES;
            load_tile::<L>(queries, scratch, first_key, head_dim);
            // Rows before this one lie wholly before the tile; rows from `full` on see all of it.
            let begin = first_key.saturating_sub(queries.first_position) * queries.group;
            let full = (first_key + LANES - 1).saturating_sub(queries.first_position) * queries.group;
            let full = full.clamp(begin, rows);
            scores::<L>(scratch, begin, rows, head_dim);
            for row in begin..rows {
                let position = queries.first_position + row / queries.group;
                soften::<L>(scratch, row, (position + 1 - first_key).min(LANES));
            }
            for row in begin..full {
                let position = queries.first_position + row / queries.group;
                accumulate::<L, 1>(scratch, row, (position + 1 - first_key).min(LANES), head_dim);
            }
            let mut row = full;
            while row + 8 <= rows {
                accumulate::<L, 8>(scratch, row, LANES, head_dim);
                row += 8;
            }
            while row + 2 <= rows {
                accumulate::<L, 2>(scratch, row, LANES, head_dim);
                row += 2;
            }
            if row < rows {
                accumulate::<L, 1>(scratch, row, LANES, head_dim);
            }
        }
        for row in 0..rows {
            let to =
                queries.out.add(row / queries.group * queries.out_stride + row % queries.group * head_dim);
            let sum = L::splat(scratch.sums[row]);
            for at in (0..head_dim).step_by(LANES) {
                L::load(scratch.out.as_ptr().add(row * head_dim + at)).div(sum).store(to.add(at));
            }
        }
    }
}

/// Sizes the buffers and copies the queries, scaled.
unsafe fn prepare(queries: &Queries<'_>, scratch: &mut Scratch, rows: usize, head_dim: usize) {
    let scale = 1.0 / (head_dim as f32).sqrt();
    scratch.q.clear();
    for row in 0..rows {
        let at = row / queries.group * queries.q_stride + row % queries.group * head_dim;
        // SAFETY: the caller's pointer is valid for all rows.
        let q = unsafe { std::slice::from_raw_parts(queries.q.add(at), head_dim) };
        scratch.q.extend(q.iter().map(|x| x * scale));
    }
    for buffer in [&mut scratch.k, &mut scratch.v] {
        buffer.resize(LANES * head_dim, 0.0);
    }
    scratch.pairs.resize(LANES * head_dim / 2, 0);
    scratch.weights.resize(rows * LANES, 0.0);
    scratch.rescale.resize(rows, 0.0);
    for (buffer, len, value) in [
        (&mut scratch.maxima, rows, f32::MIN),
        (&mut scratch.sums, rows, 0.0),
        (&mut scratch.out, rows * head_dim, 0.0),
    ] {
        buffer.clear();
        buffer.resize(len, value);
    }
}

/// Reads a tile of keys, turned, and of values.
#[inline(always)]
unsafe fn load_tile<L: Lanes>(
    queries: &Queries<'_>,
    scratch: &mut Scratch,
    first_key: usize,
    head_dim: usize,
) {
    let stride = queries.kv.layout().token_elements();
    let (k, v) = queries.kv.tile(queries.blocks, queries.layer, first_key);
    let at = queries.kv_head * head_dim;
    // SAFETY: a tile has 16 tokens, `stride` elements apart, and the buffers have 16 x head_dim elements.
    unsafe {
        let (to_k, to_v) = (scratch.k.as_mut_ptr(), scratch.v.as_mut_ptr());
        // Turned as pairs of elements, through memory, before they are widened.
        let turned = scratch.pairs.as_mut_ptr();
        let pairs = head_dim / 2;
        for pair in (0..pairs).step_by(LANES) {
            let from = k.add(at).cast::<u32>().add(pair);
            if pairs - pair >= LANES {
                L::turn(from, stride / 2, turned.add(pair * LANES));
            } else {
                turn_columns(from, stride / 2, turned.add(pair * LANES), pairs - pair);
            }
        }
        for pair in 0..pairs {
            let (first, second) = L::load_pairs(turned.add(pair * LANES));
            first.store(to_k.add(2 * pair * LANES));
            second.store(to_k.add((2 * pair + 1) * LANES));
        }
        let (mut from, mut to) = (v.add(at), to_v);
        for _ in 0..LANES {
            for element in (0..head_dim).step_by(LANES) {
                L::load_bf16(from.add(element)).store(to.add(element));
            }
            (from, to) = (from.add(stride), to.add(head_dim));
        }
    }
}

/// Scores of rows `begin..end` against the tile: one chain of multiply-adds over the head's elements each.
#[inline(always)]
unsafe fn scores<L: Lanes>(scratch: &mut Scratch, begin: usize, end: usize, head_dim: usize) {
    let mut row = begin;
    // SAFETY: rows below `end` are in the buffers.
    unsafe {
        while row + 8 <= end {
            score_rows::<L, 8>(scratch, row, head_dim);
            row += 8;
        }
        while row + 2 <= end {
            score_rows::<L, 2>(scratch, row, head_dim);
            row += 2;
        }
        if row < end {
            score_rows::<L, 1>(scratch, row, head_dim);
        }
    }
}

#[inline(always)]
unsafe fn score_rows<L: Lanes, const R: usize>(scratch: &mut Scratch, row: usize, head_dim: usize) {
    // SAFETY: the buffers have R rows from `row` on.
    unsafe {
        let (mut q, mut k) = (scratch.q.as_ptr().add(row * head_dim), scratch.k.as_ptr());
        let mut sums = [L::splat(0.0); R];
        for _ in 0..head_dim {
            let keys = L::load(k);
            for (r, sum) in sums.iter_mut().enumerate() {
                *sum = L::splat(*q.add(r * head_dim)).mul_add(keys, *sum);
            }
            (q, k) = (q.add(1), k.add(LANES));
        }
        for (r, sum) in sums.iter().enumerate() {
            sum.store(scratch.weights.as_mut_ptr().add((row + r) * LANES));
        }
    }
}

/// Turns a row's scores of the tile into weights; only the first `seen` keys count.
#[inline(always)]
unsafe fn soften<L: Lanes>(scratch: &mut Scratch, row: usize, seen: usize) {
    let scores: &mut [f32] = &mut scratch.weights[row * LANES..][..LANES];
    let mut lanes = [f32::MIN; LANES];
    lanes[..seen].copy_from_slice(&scores[..seen]);
    let before = scratch.maxima[row];
    let highest = maximum(lanes);
    let highest = if highest > before { highest } else { before };
    let mut weights = [0.0; LANES];
    let mut rescale = [0.0; LANES];
    // SAFETY: all arrays have 16 elements; the instruction set is the caller's.
    unsafe {
        let lanes = L::load(lanes.as_ptr()).sub(L::splat(highest));
        exp(lanes).store(weights.as_mut_ptr());
        exp(L::splat(before - highest)).store(rescale.as_mut_ptr());
    }
    weights[seen..].fill(0.0);
    scratch.maxima[row] = highest;
    scratch.rescale[row] = rescale[0];
    scratch.sums[row] = scratch.sums[row] * rescale[0] + sum(weights);
    scores.copy_from_slice(&weights);
}

/// Adds the first `seen` values of the tile to the outputs of R rows.
#[inline(always)]
unsafe fn accumulate<L: Lanes, const R: usize>(
    scratch: &mut Scratch,
    row: usize,
    seen: usize,
    head_dim: usize,
) {
    // SAFETY: the buffers have R rows from `row` on, and 16 values.
    unsafe {
        let (weights, v) = (scratch.weights.as_ptr().add(row * LANES), scratch.v.as_ptr());
        let out = scratch.out.as_mut_ptr().add(row * head_dim);
        let rescale = scratch.rescale.as_ptr().add(row);
        for at in (0..head_dim).step_by(LANES) {
            let mut sums = [L::splat(0.0); R];
            for (r, sum) in sums.iter_mut().enumerate() {
                *sum = L::load(out.add(r * head_dim + at)).mul(L::splat(*rescale.add(r)));
            }
            let (mut value, mut weight) = (v.add(at), weights);
            for _ in 0..seen {
                let lanes = L::load(value);
                for (r, sum) in sums.iter_mut().enumerate() {
                    *sum = L::splat(*weight.add(r * LANES)).mul_add(lanes, *sum);
                }
                (value, weight) = (value.add(head_dim), weight.add(1));
            }
            for (r, sum) in sums.iter().enumerate() {
                sum.store(out.add(r * head_dim + at));
            }
        }
    }
}

/// Attention in f64 without tiles, for comparison.
#[cfg(test)]
fn plain(q: &[f32], keys: &[Vec<f32>], values: &[Vec<f32>]) -> Vec<f64> {
    let scale = 1.0 / (q.len() as f64).sqrt();
    let dot = |k: &Vec<f32>| q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() * scale;
    let scores: Vec<f64> = keys.iter().map(dot).collect();
    let top = scores.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
    let total: f64 = weights.iter().sum();
    (0..q.len())
        .map(|e| weights.iter().zip(values).map(|(w, v)| w * f64::from(v[e])).sum::<f64>() / total)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::lanes::{narrow, widen};
    use crate::engine::{Isa, KvLayout};

    #[test]
    fn matches_plain_attention_and_garbage_behind_the_end_does_not_matter() {
        let (head_dim, tokens) = (32, 45);
        let layout = KvLayout { layers: 1, kv_heads: 1, head_dim, tokens_per_block: 16 };
        let kv = KvMemory::private(layout, 4);
        let blocks = [BlockId(2), BlockId(0), BlockId(3)];
        let value = |seed: usize| ((seed * 2_654_435_761) % 10_007) as f32 / 5_000.0 - 1.0;
        let row = |base: usize| -> Vec<f32> {
            (0..head_dim).map(|e| widen(narrow(value(base * head_dim + e)))).collect()
        };
        let keys: Vec<_> = (0..tokens).map(|t| row(t + 1)).collect();
        let values: Vec<_> = (0..tokens).map(|t| row(t + 1000)).collect();
        for token in 0..48 {
            let garbage = vec![f32::INFINITY; head_dim];
            let (k, v) = if token < tokens { (&keys[token], &values[token]) } else { (&garbage, &garbage) };
            // SAFETY: nobody else uses this memory.
            unsafe { kv.write(blocks[token / 16], token % 16, 0, k, v) };
        }
        let q: Vec<f32> = (0..tokens * 2).flat_map(|r| row(r + 5000)).map(|x| x * 4.0).collect();
        for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512].into_iter().filter(|isa| isa.available()) {
            for (first, count) in [(0, tokens), (17, 9), (44, 1), (15, 18)] {
                let mut out = vec![0.0; count * 2 * head_dim];
                let queries = Queries {
                    kv: &kv,
                    blocks: &blocks,
                    layer: 0,
                    kv_head: 0,
                    group: 2,
                    first_position: first,
                    tokens: count,
                    q: q[first * 2 * head_dim..].as_ptr(),
                    q_stride: 2 * head_dim,
                    out: out.as_mut_ptr(),
                    out_stride: 2 * head_dim,
                };
                // SAFETY: `q` and `out` have `count` tokens of two heads.
                unsafe { attend(isa, &queries, &mut Scratch::default()) };
                for r in 0..count * 2 {
                    let seen = first + r / 2 + 1;
                    let want =
                        plain(&q[(first * 2 + r) * head_dim..][..head_dim], &keys[..seen], &values[..seen]);
                    for (e, want) in want.iter().enumerate() {
                        let got = f64::from(out[r * head_dim + e]);
                        assert!((got - want).abs() < 1e-5, "{isa:?} first {first} row {r}: {got} not {want}");
                    }
                }
            }
        }
    }
}
