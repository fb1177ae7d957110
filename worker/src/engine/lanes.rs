//! Sixteen f32 side by side: the one vector type in which all hot kernels are written.
//!
//! Every operation is exact IEEE 754 with one rounding, on every implementation, so kernels that are generic over
//! [`Lanes`] give the same bits with AVX-512, with AVX2 and without either. Nothing here adds across lanes; kernels that
//! must do so store the lanes and use [`sum`] or [`maximum`], whose order is fixed.

/// Number of lanes.
pub(crate) const LANES: usize = 16;

/// Sixteen f32. The methods are inlined into functions that enable the instruction set, which is why all are unsafe:
/// the caller must know that the processor has it. Pointers need no alignment and must be valid for the access.
pub(crate) trait Lanes: Copy {
    /// There are 32 registers of this type, so that tiles may be large.
    const WIDE: bool;

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// Sixteen bf16 that lie side by side.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// Sixteen pairs of bf16: the first elements of the pairs, and the second.
    unsafe fn load_pairs(from: *const u32) -> (Self, Self);
    /// Turns 16 rows of 16 pairs, `stride` pairs apart, into 16 columns of 16, one behind the other.
    unsafe fn turn(from: *const u32, stride: usize, to: *mut u32);
    /// `self * factor + addend`, rounded once.
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self;
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// The larger; `other` where they do not compare.
    unsafe fn max(self, other: Self) -> Self;
    /// The smaller; `other` where they do not compare.
    unsafe fn min(self, other: Self) -> Self;
    /// Two to the power of the integer n in -126..=127, given as `n + 1.5 * 2^23`.
    unsafe fn power_of_two(self) -> Self;
}

const ROUNDING: f32 = 12_582_912.0;

/// e to the power of each lane, within 2 units in the last place; inputs are clamped to -87.3 ..= 88.3.
///
/// # Safety
/// The processor must have the instruction set of `L`.
#[inline(always)]
pub(crate) unsafe fn exp<L: Lanes>(x: L) -> L {
    const COEFFICIENTS: [f32; 6] =
        [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_66, 0.5];
    // SAFETY: upheld by the caller; no memory is touched.
    unsafe {
        let x = x.max(L::splat(-87.3)).min(L::splat(88.3));
        let shifted = x.mul_add(L::splat(std::f32::consts::LOG2_E), L::splat(ROUNDING));
        let n = shifted.sub(L::splat(ROUNDING));
        // x = n * ln 2 + r, with ln 2 split so that the first product is exact.
        let r = n.mul_add(L::splat(-0.693_359_4), x);
        let r = n.mul_add(L::splat(2.121_944_4e-4), r);
        let mut p = L::splat(COEFFICIENTS[0]);
        for c in &COEFFICIENTS[1..] {
            p = p.mul_add(r, L::splat(*c));
        }
        let y = p.mul_add(r.mul(r), r).add(L::splat(1.0));
        y.mul(shifted.power_of_two())
    }
}

/// The sum of all lanes, by halving.
#[inline(always)]
pub(crate) fn sum(mut lanes: [f32; LANES]) -> f32 {
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}

/// The largest lane.
#[inline(always)]
pub(crate) fn maximum(mut lanes: [f32; LANES]) -> f32 {
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            lanes[i] = if lanes[i] > lanes[i + width] { lanes[i] } else { lanes[i + width] };
        }
    }
    lanes[0]
}

/// [`Lanes::turn`] of so many columns.
///
/// # Safety
/// `from` must be valid for 16 rows of `columns` pairs, `to` for `columns * 16` pairs.
#[inline(always)]
pub(crate) unsafe fn turn_columns(from: *const u32, stride: usize, to: *mut u32, columns: usize) {
    for row in 0..LANES {
        for column in 0..columns {
            // SAFETY: the caller's promise.
            unsafe { to.add(column * LANES + row).write(from.add(row * stride + column).read_unaligned()) };
        }
    }
}

/// The value of a bf16.
#[inline(always)]
pub(crate) fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The nearest bf16, ties to even. NaN is not expected.
#[inline(always)]
pub(crate) fn narrow(value: f32) -> u16 {
    let bits = value.to_bits();
    (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// The portable implementation.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, op: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| op(self.0[i], other.0[i])))
    }
}

impl Lanes for Portable {
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for 16 elements.
        Self(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for 16 elements.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller vouches for 16 elements.
        Self(unsafe { from.cast::<[u16; LANES]>().read_unaligned() }.map(widen))
    }

    #[inline(always)]
    unsafe fn load_pairs(from: *const u32) -> (Self, Self) {
        // SAFETY: the caller vouches for 16 elements.
        let pairs = unsafe { from.cast::<[u32; LANES]>().read_unaligned() };
        (
            Self(pairs.map(|pair| f32::from_bits(pair << 16))),
            Self(pairs.map(|pair| f32::from_bits(pair & 0xffff_0000))),
        )
    }

    #[inline(always)]
    unsafe fn turn(from: *const u32, stride: usize, to: *mut u32) {
        // SAFETY: the caller vouches for 16 rows and columns.
        unsafe { turn_columns(from, stride, to, LANES) }
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i].mul_add(factor.0[i], addend.0[i])))
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        Self(self.0.map(|x| f32::from_bits(x.to_bits().wrapping_add(127) << 23)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate() {
        for i in -8730..=8830 {
            let x = i as f32 / 100.0 + 0.001_3;
            let x = x.min(88.3);
            let mut out = [0.0; LANES];
            // SAFETY: the portable lanes need no instruction set; `out` has 16 elements.
            unsafe { exp(Portable::splat(x)).store(out.as_mut_ptr()) };
            let exact = f64::from(x).exp();
            assert!((f64::from(out[3]) - exact).abs() <= exact * 2.5e-7, "exp({x}) = {} not {exact}", out[3]);
        }
    }

    #[test]
    fn narrowing_rounds_to_even() {
        for bits in [0x3f80_0000u32, 0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0xbf80_7fff, 0] {
            let value = f32::from_bits(bits);
            assert_eq!(narrow(value), half::bf16::from_f32(value).to_bits(), "{bits:x}");
        }
    }
}
