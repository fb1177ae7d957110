//! [`Lanes`] in AVX2 with FMA (two registers each) and in AVX-512.

use std::arch::x86_64::*;

use super::lanes::Lanes;

/// Two registers of eight.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(__m256, __m256);

/// One register of sixteen.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(__m512);

/// The body of a method whose contract is that of [`Lanes`].
macro_rules! lanes {
    ($body:expr) => {
        // SAFETY: the caller of every `Lanes` method vouches for the instruction set and for the memory at the pointer.
        unsafe { $body }
    };
}

impl Lanes for Avx2 {
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        lanes!(Self(_mm256_set1_ps(value), _mm256_set1_ps(value)))
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        lanes!(Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        lanes!({
            _mm256_storeu_ps(to, self.0);
            _mm256_storeu_ps(to.add(8), self.1);
        })
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        lanes!({
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8).cast()));
            Self(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        })
    }

    #[inline(always)]
    unsafe fn load_pairs(from: *const u32) -> (Self, Self) {
        lanes!({
            let mask = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let (a, b) = (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(8).cast()));
            (
                Self(
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b)),
                ),
                Self(
                    _mm256_castsi256_ps(_mm256_and_si256(a, mask)),
                    _mm256_castsi256_ps(_mm256_and_si256(b, mask)),
                ),
            )
        })
    }

    #[inline(always)]
    unsafe fn turn(from: *const u32, stride: usize, to: *mut u32) {
        lanes!({
            for (row, column) in [(0, 0), (0, 8), (8, 0), (8, 8)] {
                let rows: [__m256i; 8] =
                    std::array::from_fn(|i| _mm256_loadu_si256(from.add((row + i) * stride + column).cast()));
                for (i, turned) in turn_eight(rows).into_iter().enumerate() {
                    _mm256_storeu_si256(to.add((column + i) * 16 + row).cast(), turned);
                }
            }
        })
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        lanes!(Self(_mm256_fmadd_ps(self.0, factor.0, addend.0), _mm256_fmadd_ps(self.1, factor.1, addend.1)))
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        lanes!(Self(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)))
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        lanes!(Self(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)))
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        lanes!(Self(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)))
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        lanes!(Self(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1)))
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        lanes!(Self(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)))
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        lanes!(Self(_mm256_min_ps(self.0, other.0), _mm256_min_ps(self.1, other.1)))
    }

    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        lanes!({
            let bias = _mm256_set1_epi32(127);
            let a = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_castps_si256(self.0), bias));
            let b = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_castps_si256(self.1), bias));
            Self(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b))
        })
    }
}

impl Lanes for Avx512 {
    const WIDE: bool = true;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        lanes!(Self(_mm512_set1_ps(value)))
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        lanes!(Self(_mm512_loadu_ps(from)))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        lanes!(_mm512_storeu_ps(to, self.0))
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        lanes!({
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        })
    }

    #[inline(always)]
    unsafe fn load_pairs(from: *const u32) -> (Self, Self) {
        lanes!({
            let pairs = _mm512_loadu_si512(from.cast());
            let mask = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            (
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs))),
                Self(_mm512_castsi512_ps(_mm512_and_si512(pairs, mask))),
            )
        })
    }

    #[inline(always)]
    unsafe fn turn(from: *const u32, stride: usize, to: *mut u32) {
        lanes!({
            let rows: [__m512i; 16] =
                std::array::from_fn(|i| _mm512_loadu_si512(from.add(i * stride).cast()));
            for (i, turned) in turn_sixteen(rows).into_iter().enumerate() {
                _mm512_storeu_si512(to.add(i * 16).cast(), turned);
            }
        })
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        lanes!(Self(_mm512_fmadd_ps(self.0, factor.0, addend.0)))
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        lanes!(Self(_mm512_add_ps(self.0, other.0)))
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        lanes!(Self(_mm512_sub_ps(self.0, other.0)))
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        lanes!(Self(_mm512_mul_ps(self.0, other.0)))
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        lanes!(Self(_mm512_div_ps(self.0, other.0)))
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        lanes!(Self(_mm512_max_ps(self.0, other.0)))
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        lanes!(Self(_mm512_min_ps(self.0, other.0)))
    }

    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        lanes!({
            let biased = _mm512_add_epi32(_mm512_castps_si512(self.0), _mm512_set1_epi32(127));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased)))
        })
    }
}

/// Turns eight rows of eight: first within quarters of four by four, then the quarters.
///
/// # Safety
/// As for every `Lanes` method.
#[inline(always)]
unsafe fn turn_eight(rows: [__m256i; 8]) -> [__m256i; 8] {
    lanes!({
        let mut quarters = [_mm256_setzero_si256(); 8];
        for i in [0, 4] {
            let (a, b) =
                (_mm256_unpacklo_epi32(rows[i], rows[i + 1]), _mm256_unpackhi_epi32(rows[i], rows[i + 1]));
            let (c, d) = (
                _mm256_unpacklo_epi32(rows[i + 2], rows[i + 3]),
                _mm256_unpackhi_epi32(rows[i + 2], rows[i + 3]),
            );
            quarters[i] = _mm256_unpacklo_epi64(a, c);
            quarters[i + 1] = _mm256_unpackhi_epi64(a, c);
            quarters[i + 2] = _mm256_unpacklo_epi64(b, d);
            quarters[i + 3] = _mm256_unpackhi_epi64(b, d);
        }
        let mut columns = [_mm256_setzero_si256(); 8];
        for i in 0..4 {
            columns[i] = _mm256_permute2x128_si256::<0x20>(quarters[i], quarters[i + 4]);
            columns[i + 4] = _mm256_permute2x128_si256::<0x31>(quarters[i], quarters[i + 4]);
        }
        columns
    })
}

/// Turns sixteen rows of sixteen, likewise.
///
/// # Safety
/// As for every `Lanes` method.
#[inline(always)]
unsafe fn turn_sixteen(rows: [__m512i; 16]) -> [__m512i; 16] {
    lanes!({
        let mut parts = [_mm512_setzero_si512(); 16];
        for i in [0, 4, 8, 12] {
            let (a, b) =
                (_mm512_unpacklo_epi32(rows[i], rows[i + 1]), _mm512_unpackhi_epi32(rows[i], rows[i + 1]));
            let (c, d) = (
                _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]),
                _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]),
            );
            parts[i] = _mm512_unpacklo_epi64(a, c);
            parts[i + 1] = _mm512_unpackhi_epi64(a, c);
            parts[i + 2] = _mm512_unpacklo_epi64(b, d);
            parts[i + 3] = _mm512_unpackhi_epi64(b, d);
        }
        let mut columns = [_mm512_setzero_si512(); 16];
        for i in 0..4 {
            let even_low = _mm512_shuffle_i32x4::<0x88>(parts[i], parts[i + 4]);
            let even_high = _mm512_shuffle_i32x4::<0x88>(parts[i + 8], parts[i + 12]);
            let odd_low = _mm512_shuffle_i32x4::<0xdd>(parts[i], parts[i + 4]);
            let odd_high = _mm512_shuffle_i32x4::<0xdd>(parts[i + 8], parts[i + 12]);
            columns[i] = _mm512_shuffle_i32x4::<0x88>(even_low, even_high);
            columns[i + 4] = _mm512_shuffle_i32x4::<0x88>(odd_low, odd_high);
            columns[i + 8] = _mm512_shuffle_i32x4::<0xdd>(even_low, even_high);
            columns[i + 12] = _mm512_shuffle_i32x4::<0xdd>(odd_low, odd_high);
        }
        columns
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Isa;

    fn turned<L: Lanes>() -> Vec<u32> {
        let from: Vec<u32> = (0..16 * 20).collect();
        let mut to = vec![0; 256];
        // SAFETY: `from` has 16 rows of 20, `to` room for 16 x 16; the caller checked the instruction set.
        unsafe { L::turn(from.as_ptr(), 20, to.as_mut_ptr()) };
        to
    }

    #[test]
    fn turning_swaps_rows_and_columns() {
        let want: Vec<u32> = (0..256).map(|i| i % 16 * 20 + i / 16).collect();
        assert_eq!(turned::<crate::engine::lanes::Portable>(), want);
        if Isa::Avx2.available() {
            assert_eq!(turned::<Avx2>(), want);
        }
        if Isa::Avx512.available() {
            assert_eq!(turned::<Avx512>(), want);
        }
    }
}
