//! What is done to each token alone: normalization, rotation, activation.

use super::isa::dispatch;
use super::lanes::{LANES, Lanes, exp, sum};

/// `to = from / rms(from) * weight`.
pub(crate) fn normalize(from: &[f32], weight: &[f32], epsilon: f32, to: &mut [f32]) {
    let scale = inverse_rms(from, epsilon);
    for ((to, x), weight) in to.iter_mut().zip(from).zip(weight) {
        *to = x * scale * weight;
    }
}

/// As [`normalize`], of one head.
pub(crate) fn normalize_in_place(head: &mut [f32], weight: &[f32], epsilon: f32) {
    let scale = inverse_rms(head, epsilon);
    for (x, weight) in head.iter_mut().zip(weight) {
        *x = *x * scale * weight;
    }
}

fn inverse_rms(from: &[f32], epsilon: f32) -> f32 {
    let mut squares = [0.0f32; LANES];
    for part in from.chunks_exact(LANES) {
        for (sum, x) in squares.iter_mut().zip(part) {
            *sum += x * x;
        }
    }
    1.0 / (sum(squares) / from.len() as f32 + epsilon).sqrt()
}

/// Turns each head of a row by the angles of a position, given as `head_dim / 2` cosines and as many sines.
pub(crate) fn rotate(heads: &mut [f32], head_dim: usize, cosines: &[f32], sines: &[f32]) {
    for head in heads.chunks_exact_mut(head_dim) {
        let (low, high) = head.split_at_mut(head_dim / 2);
        for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cosines).zip(sines) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

/// `to = silu(gate) * up` for one token.
pub(crate) fn activate(isa: super::Isa, gate: &[f32], up: &[f32], to: &mut [f32]) {
    assert!(
        gate.len() == up.len() && gate.len() == to.len() && gate.len().is_multiple_of(LANES),
        "equal lengths"
    );
    // SAFETY: the pointers are valid for the length, a multiple of 16.
    unsafe { activate_lanes(isa, gate.as_ptr(), up.as_ptr(), to.as_mut_ptr(), gate.len()) }
}

dispatch! {
    fn activate_lanes = activate_generic(gate: *const f32, up: *const f32, to: *mut f32, len: usize)
}

#[inline(always)]
unsafe fn activate_generic<L: Lanes>(gate: *const f32, up: *const f32, to: *mut f32, len: usize) {
    for at in (0..len).step_by(LANES) {
        // SAFETY: the caller's pointers are valid for `len` elements, a multiple of 16.
        unsafe {
            let x = L::load(gate.add(at));
            let one = L::splat(1.0);
            let silu = x.div(one.add(exp(L::splat(0.0).sub(x))));
            silu.mul(L::load(up.add(at))).store(to.add(at));
        }
    }
}

/// `to = e to the power of (from - top) * scale`; exponents below -87 give 0. `top` is the largest of `from`.
pub(crate) fn exponentials(isa: super::Isa, from: &[f32], top: f32, scale: f32, to: &mut [f32]) {
    assert!(from.len() == to.len(), "equal lengths");
    // SAFETY: both slices have `from.len()` elements.
    unsafe { exponentials_lanes(isa, from.as_ptr(), top, scale, to.as_mut_ptr(), from.len()) }
}

dispatch! {
    fn exponentials_lanes =
        exponentials_generic(from: *const f32, top: f32, scale: f32, to: *mut f32, len: usize)
}

#[inline(always)]
unsafe fn exponentials_generic<L: Lanes>(from: *const f32, top: f32, scale: f32, to: *mut f32, len: usize) {
    for at in (0..len).step_by(LANES) {
        let count = LANES.min(len - at);
        let mut lanes = [top; LANES];
        // SAFETY: the caller's pointers are valid for `count` elements behind `at`, the array for 16.
        unsafe {
            lanes.as_mut_ptr().copy_from_nonoverlapping(from.add(at), count);
            let exponent = L::load(lanes.as_ptr()).sub(L::splat(top)).mul(L::splat(scale));
            exponent.store(lanes.as_mut_ptr());
            let mut powers = [0.0; LANES];
            exp(exponent).store(powers.as_mut_ptr());
            for (power, exponent) in powers.iter_mut().zip(lanes) {
                if exponent < -87.0 {
                    *power = 0.0;
                }
            }
            to.add(at).copy_from_nonoverlapping(powers.as_ptr(), count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalizing_gives_unit_mean_square() {
        let from: Vec<f32> = (0..64).map(|i| i as f32 - 20.0).collect();
        let mut to = vec![0.0; 64];
        normalize(&from, &[2.0; 64], 1e-5, &mut to);
        let mean = to.iter().map(|x| x * x).sum::<f32>() / 64.0;
        assert!((mean - 4.0).abs() < 1e-4);
    }

    #[test]
    fn rotation_keeps_lengths() {
        let mut head = vec![3.0, 1.0, 4.0, 2.0];
        rotate(&mut head, 4, &[0.6, 1.0], &[0.8, 0.0]);
        assert_eq!(head, vec![3.0 * 0.6 - 4.0 * 0.8, 1.0, 4.0 * 0.6 + 3.0 * 0.8, 2.0]);
    }

    #[test]
    fn activation_is_silu_times_up() {
        let gate: Vec<f32> = (0..32).map(|i| i as f32 - 16.0).collect();
        let mut to = vec![0.0; 32];
        activate(super::super::Isa::Portable, &gate, &[3.0; 32], &mut to);
        for (x, got) in gate.iter().zip(to) {
            assert!((x / (1.0 + (-x).exp()) * 3.0 - got).abs() < 1e-5);
        }
    }
}
