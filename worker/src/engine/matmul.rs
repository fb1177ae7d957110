//! `y[t][r] = sum over k of x[t][k] * w[r][k]`, each sum being one chain of fused multiply-adds over ascending `k` that
//! starts at zero. The chain does not depend on tile sizes, threads or neighbours, so neither do its bits.

use rayon::prelude::*;

use super::Isa;
use super::isa::dispatch;
use super::lanes::{LANES, Lanes};
use super::packed::Packed;

/// Panels of one piece of work.
const GROUP: usize = 8;
/// Tokens of one piece of work.
const SPAN: usize = 96;
/// Below so many multiply-adds, waking other threads costs more than it saves.
const SERIAL_WORK: usize = 400_000;

/// Where a piece of work reads and writes.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// Input of the first token.
    x: *const f32,
    /// Output of the first token, first row of the first panel.
    y: *mut f32,
    /// First panel.
    w: *const u32,
    columns: usize,
    /// Elements from one token's output to the next.
    rows: usize,
    /// Rows from the first of the first panel to the end of the matrix.
    rows_left: usize,
}

/// A pointer that pieces of work on other threads write through, each its own elements.
struct Shared(*mut f32);
// SAFETY: the pieces write disjoint elements, which `matmul` sees to.
unsafe impl Sync for Shared {}

impl Shared {
    fn get(&self) -> *mut f32 {
        self.0
    }
}

/// Multiplies `tokens` rows of `x` by `w` into `y`, on the threads of the pool that the caller is in.
pub(crate) fn matmul(isa: Isa, x: &[f32], w: &Packed, y: &mut [f32], tokens: usize) {
    let (rows, columns) = (w.rows(), w.columns());
    assert!(x.len() >= tokens * columns && y.len() >= tokens * rows, "operands are large enough");
    let (groups, spans) = (w.panels().div_ceil(GROUP), tokens.div_ceil(SPAN));
    let out = Shared(y.as_mut_ptr());
    let piece = |index: usize| {
        let (panel, token) = (index / spans * GROUP, index % spans * SPAN);
        // SAFETY: `token < tokens` and `panel * 16 < rows`, and the lengths were checked above.
        let place = unsafe {
            Place {
                x: x.as_ptr().add(token * columns),
                y: out.get().add(token * rows + panel * LANES),
                w: w.panel(panel),
                columns,
                rows,
                rows_left: rows - panel * LANES,
            }
        };
        // SAFETY: the piece has `panels` panels of `w`, which lie one behind the other, and `tokens` tokens of `x` and
        // `y`; no other piece writes the same rows of the same tokens.
        unsafe { work(isa, place, GROUP.min(w.panels() - panel), SPAN.min(tokens - token)) };
    };
    if tokens * rows * columns < SERIAL_WORK || groups * spans == 1 {
        (0..groups * spans).for_each(piece);
    } else {
        (0..groups * spans).into_par_iter().with_max_len(1).for_each(piece);
    }
}

dispatch! {
    /// One piece of work.
    fn work = piece(place: Place, panels: usize, tokens: usize)
}

/// # Safety
/// `place` must be valid for `panels` panels and `tokens` tokens.
#[inline(always)]
unsafe fn piece<L: Lanes>(place: Place, panels: usize, tokens: usize) {
    let mut token = 0;
    while token < tokens {
        let left = tokens - token;
        // SAFETY: `strip` of n tokens is only called with at least n left.
        unsafe {
            let at =
                Place { x: place.x.add(token * place.columns), y: place.y.add(token * place.rows), ..place };
            token += if L::WIDE {
                match left {
                    12.. => strip::<L, 12, 2>(at, panels),
                    6..12 => strip::<L, 6, 4>(at, panels),
                    4..6 => strip::<L, 4, 4>(at, panels),
                    3 => strip::<L, 3, 8>(at, panels),
                    2 => strip::<L, 2, 8>(at, panels),
                    _ => strip::<L, 1, 8>(at, panels),
                }
            } else {
                match left {
                    6.. => strip::<L, 6, 1>(at, panels),
                    3..6 => strip::<L, 3, 2>(at, panels),
                    2 => strip::<L, 2, 2>(at, panels),
                    _ => strip::<L, 1, 4>(at, panels),
                }
            };
        }
    }
}

/// Some tokens against all panels, `P` at a time. Returns the number of tokens.
#[inline(always)]
unsafe fn strip<L: Lanes, const T: usize, const P: usize>(at: Place, panels: usize) -> usize {
    let mut panel = 0;
    // SAFETY: `panel` stays below `panels`; the rest is the caller's.
    unsafe {
        while panel + P <= panels {
            tile::<L, T, P>(at.behind(panel));
            panel += P;
        }
        while panel < panels {
            tile::<L, T, 1>(at.behind(panel));
            panel += 1;
        }
    }
    T
}

impl Place {
    /// The place `panels` panels further on.
    ///
    /// # Safety
    /// There must be so many.
    #[inline(always)]
    unsafe fn behind(self, panels: usize) -> Self {
        // SAFETY: the caller says that the panels exist.
        unsafe {
            Self {
                y: self.y.add(panels * LANES),
                w: self.w.add(panels * self.columns / 2 * LANES),
                rows_left: self.rows_left - panels * LANES,
                ..self
            }
        }
    }
}

#[inline(always)]
unsafe fn tile<L: Lanes, const T: usize, const P: usize>(at: Place) {
    let pairs = at.columns / 2;
    // SAFETY: `at` is valid for T tokens and P panels, each of `pairs` lines of 16 pairs.
    unsafe {
        let mut sums = [[L::splat(0.0); P]; T];
        let (mut x_pair, mut w_pair) = (at.x, at.w);
        for _ in 0..pairs {
            let mut first = [L::splat(0.0); P];
            let mut second = [L::splat(0.0); P];
            for p in 0..P {
                (first[p], second[p]) = L::load_pairs(w_pair.add(p * pairs * LANES));
            }
            for (t, sums) in sums.iter_mut().enumerate() {
                let x = L::splat(*x_pair.add(t * at.columns));
                for (sum, w) in sums.iter_mut().zip(first) {
                    *sum = x.mul_add(w, *sum);
                }
            }
            for (t, sums) in sums.iter_mut().enumerate() {
                let x = L::splat(*x_pair.add(t * at.columns + 1));
                for (sum, w) in sums.iter_mut().zip(second) {
                    *sum = x.mul_add(w, *sum);
                }
            }
            (x_pair, w_pair) = (x_pair.add(2), w_pair.add(LANES));
        }
        for (t, sums) in sums.iter().enumerate() {
            for (p, sum) in sums.iter().enumerate() {
                let to = at.y.add(t * at.rows + p * LANES);
                let left = at.rows_left - p * LANES;
                if left >= LANES {
                    sum.store(to);
                } else {
                    let mut last = [0.0; LANES];
                    sum.store(last.as_mut_ptr());
                    to.copy_from_nonoverlapping(last.as_ptr(), left);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::lanes::widen;

    fn noise(seed: u32) -> impl FnMut() -> f32 {
        let mut state = seed;
        move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        }
    }

    #[test]
    fn every_tile_equals_the_plain_chain() {
        let mut next = noise(1);
        for (rows, columns) in [(16, 32), (37, 48), (300, 34)] {
            let w: Vec<u16> = (0..rows * columns).map(|_| crate::engine::lanes::narrow(next())).collect();
            let packed = Packed::new(&[&w], columns);
            for tokens in [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 29, 100, 200] {
                let x: Vec<f32> = (0..tokens * columns).map(|_| next()).collect();
                let chain = |t: usize, r: usize| {
                    (0..columns)
                        .fold(0.0f32, |sum, k| x[t * columns + k].mul_add(widen(w[r * columns + k]), sum))
                };
                let want: Vec<u32> =
                    (0..tokens * rows).map(|i| chain(i / rows, i % rows).to_bits()).collect();
                for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512].into_iter().filter(|isa| isa.available()) {
                    let mut y = vec![0.0; tokens * rows];
                    matmul(isa, &x, &packed, &mut y, tokens);
                    let got: Vec<u32> = y.iter().map(|v| v.to_bits()).collect();
                    assert_eq!(got, want, "{isa:?} {rows}x{columns} {tokens} tokens");
                }
            }
        }
    }
}
