//! Copies of whole blocks that nobody reads soon: stores go past the caches.
//!
//! An ordinary store first reads the line it is about to overwrite, and then keeps it: a block that is copied costs
//! three times its size in memory traffic, and its size in cache that the engine had better use for. Streaming stores
//! write full lines straight to memory. They pay from a few pages on; short copies stay with the C library, and so does
//! every processor without such stores, or with a C library that does as well.
//!
//! ```text
//!   to:  [head .. 64)  [ whole strides of 256 bytes, streamed )  [tail)
//! ```

use std::ptr;

/// Shorter copies are the C library's. Measured on scattered blocks: no difference at 4 KiB, 10 % at 16 KiB, 25 % and
/// more from 64 KiB on.
const STREAM_BYTES_MIN: usize = 16 << 10;

/// Copies `len` bytes. Others may see them late: see [`settle`]. Where the next copy will begin to read may be told, or is
/// null: the first lines of a copy cost a wait each, unless they were fetched during the one before.
///
/// # Safety
/// As for [`ptr::copy_nonoverlapping`], except that both ranges may be changed by other processes meanwhile. `next` is not
/// accessed.
pub(crate) unsafe fn streaming_copy(from: *const u8, to: *mut u8, len: usize, next: *const u8) {
    #[cfg(target_arch = "x86_64")]
    if len >= STREAM_BYTES_MIN
        && let Some(kernel) = x86::kernel()
    {
        // SAFETY: the caller's promise; `kernel` only returns what this processor can execute.
        return unsafe { x86::copy(kernel, from, to, len, next) };
    }
    let _ = next;
    // SAFETY: the caller's promise.
    unsafe { ptr::copy_nonoverlapping(from, to, len) }
}

/// Whoever is told from now on of the copies of this thread sees all of them: streaming stores are not ordered with later
/// ones. Waiting for them costs as much as some KiB, so it is done once for several copies.
pub(crate) fn settle() {
    #[cfg(target_arch = "x86_64")]
    if x86::kernel().is_some() {
        x86::settle();
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __cpuid, __m256i, __m512i, _MM_HINT_NTA, _mm_prefetch, _mm_sfence, _mm256_loadu_si256,
        _mm256_stream_si256, _mm512_loadu_si512, _mm512_stream_si512,
    };
    use std::ptr;
    use std::sync::OnceLock;

    const LINE: usize = 64;
    /// Bytes in one step of a kernel: four lines in flight at once.
    pub(super) const STRIDE: usize = 4 * LINE;
    /// How far ahead the source is fetched. 1, 2 and 4 KiB measure alike; none is slower on blocks of 64 KiB.
    const AHEAD: usize = 2 << 10;

    /// Streams `len` bytes, a multiple of [`STRIDE`], to an address that is a multiple of [`LINE`].
    pub(super) type Kernel = unsafe fn(from: *const u8, to: *mut u8, len: usize, next: *const u8);

    /// What long copies are done with; `None`: the C library's copy is as fast.
    pub(super) fn kernel() -> Option<Kernel> {
        // Asking the processor is slow where a hypervisor answers.
        static KERNEL: OnceLock<Option<Kernel>> = OnceLock::new();
        *KERNEL.get_or_init(|| widest().filter(|_| streaming_pays()))
    }

    /// On AMD's processors (Zen 4: 1.2 to 1.35 times the C library's copy). On Intel's (Sapphire Rapids) the C library's
    /// `rep movsb` writes full lines as well, and streaming stores reach 0.84 to 1.0 of it.
    fn streaming_pays() -> bool {
        let vendor = __cpuid(0);
        let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat();
        [&b"AuthenticAMD"[..], b"HygonGenuine"].contains(&name.as_slice())
    }

    /// The widest that this processor has.
    fn widest() -> Option<Kernel> {
        if is_x86_feature_detected!("avx512f") {
            Some(stream_avx512)
        } else if is_x86_feature_detected!("avx2") {
            Some(stream_avx2)
        } else {
            None
        }
    }

    /// Head and tail by ordinary stores, the rest by `kernel`.
    ///
    /// # Safety
    /// As for [`ptr::copy_nonoverlapping`], and the processor can execute `kernel`.
    pub(super) unsafe fn copy(kernel: Kernel, from: *const u8, to: *mut u8, len: usize, next: *const u8) {
        let head = to.align_offset(LINE).min(len);
        let body = (len - head) / STRIDE * STRIDE;
        let tail = head + body;
        // SAFETY: the three pieces follow each other within `len`; after `head` bytes `to` is aligned to a line.
        unsafe {
            ptr::copy_nonoverlapping(from, to, head);
            kernel(from.add(head), to.add(head), body, next);
            ptr::copy_nonoverlapping(from.add(tail), to.add(tail), len - tail);
        }
    }

    pub(super) fn settle() {
        // SAFETY: every x86-64 processor has it.
        unsafe { _mm_sfence() }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn stream_avx512(from: *const u8, to: *mut u8, len: usize, next: *const u8) {
        for at in (0..len).step_by(STRIDE) {
            fetch(from, at, len, next);
            // SAFETY: `at + STRIDE <= len`, because `len` is a multiple of it; `to` is aligned to a line.
            unsafe {
                let (from, to): (*const __m512i, *mut __m512i) = (from.add(at).cast(), to.add(at).cast());
                let (a, b) = (_mm512_loadu_si512(from), _mm512_loadu_si512(from.add(1)));
                let (c, d) = (_mm512_loadu_si512(from.add(2)), _mm512_loadu_si512(from.add(3)));
                _mm512_stream_si512(to, a);
                _mm512_stream_si512(to.add(1), b);
                _mm512_stream_si512(to.add(2), c);
                _mm512_stream_si512(to.add(3), d);
            }
        }
    }

    #[target_feature(enable = "avx2")]
    unsafe fn stream_avx2(from: *const u8, to: *mut u8, len: usize, next: *const u8) {
        for at in (0..len).step_by(STRIDE) {
            fetch(from, at, len, next);
            for half in [at, at + STRIDE / 2] {
                // SAFETY: as for `stream_avx512`.
                unsafe {
                    let (from, to): (*const __m256i, *mut __m256i) =
                        (from.add(half).cast(), to.add(half).cast());
                    let (a, b) = (_mm256_loadu_si256(from), _mm256_loadu_si256(from.add(1)));
                    let (c, d) = (_mm256_loadu_si256(from.add(2)), _mm256_loadu_si256(from.add(3)));
                    _mm256_stream_si256(to, a);
                    _mm256_stream_si256(to.add(1), b);
                    _mm256_stream_si256(to.add(2), c);
                    _mm256_stream_si256(to.add(3), d);
                }
            }
        }
    }

    /// Asks for the source's lines `AHEAD` of `at`; behind its end for those of the next copy, if there is one.
    #[inline(always)]
    fn fetch(from: *const u8, at: usize, len: usize, next: *const u8) {
        let (source, ahead) =
            if at + AHEAD < len { (from, at + AHEAD) } else { (next, (at + AHEAD).wrapping_sub(len)) };
        if !source.is_null() {
            for line in 0..STRIDE / LINE {
                // SAFETY: a prefetch never faults, whatever the address.
                unsafe { _mm_prefetch::<_MM_HINT_NTA>(source.wrapping_add(ahead + line * LINE).cast()) }
            }
        }
    }

    #[cfg(test)]
    pub(super) fn kernels() -> Vec<Kernel> {
        let mut kernels: Vec<Kernel> = Vec::new();
        if is_x86_feature_detected!("avx512f") {
            kernels.push(stream_avx512);
        }
        if is_x86_feature_detected!("avx2") {
            kernels.push(stream_avx2);
        }
        kernels
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Most that a copy may start behind an aligned address, and guard bytes around the target.
    const SLACK: usize = 192;
    const GUARD: u8 = 0xA5;

    /// Different at every offset within any 250 lines.
    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|at| (at % 251) as u8 ^ (at / 251) as u8).collect()
    }

    /// The copy arrives whole, and nothing beside it is touched.
    fn check(from_shift: usize, to_shift: usize, len: usize, copy: impl Fn(*const u8, *mut u8, usize)) {
        let from = pattern(from_shift + len);
        let mut to = vec![GUARD; to_shift + len + SLACK];
        copy(from[from_shift..].as_ptr(), to[to_shift..].as_mut_ptr(), len);
        let (before, rest) = to.split_at(to_shift);
        let (copied, after) = rest.split_at(len);
        assert!(copied == &from[from_shift..], "{len} bytes from +{from_shift} to +{to_shift}");
        assert!(before.iter().chain(after).all(|byte| *byte == GUARD), "{len} bytes to +{to_shift}");
    }

    fn public(from: *const u8, to: *mut u8, len: usize) {
        // SAFETY: `check` hands out distinct buffers of at least `len` bytes.
        unsafe { streaming_copy(from, to, len, ptr::null()) }
    }

    #[test]
    fn lengths_around_the_threshold_and_every_stride_arrive_whole() {
        for len in (0..300).chain(STREAM_BYTES_MIN - 130..STREAM_BYTES_MIN + 330) {
            check(len % 67, len % 71, len, public);
        }
    }

    #[test]
    fn every_alignment_of_both_ends_arrives_whole() {
        for from_shift in 0..65 {
            for to_shift in 0..65 {
                check(from_shift, to_shift, STREAM_BYTES_MIN + 1, public);
            }
        }
    }

    /// Also the kernel that this processor would not choose, also on lengths it is not chosen for.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn each_kernel_copies_any_length() {
        for kernel in x86::kernels() {
            for len in (0..2 * x86::STRIDE + 70).chain([4096, 5000, 100_003]) {
                check(len % 61, len % 73, len, |from, to, len| {
                    // SAFETY: as for `public`; only kernels of this processor are listed.
                    unsafe { x86::copy(kernel, from, to, len, from) }
                });
            }
        }
    }

    proptest! {
        #[test]
        fn any_copy_arrives_whole(from_shift in 0..SLACK, to_shift in 0..SLACK, len in 0usize..300_000) {
            check(from_shift, to_shift, len, public);
        }
    }
}
