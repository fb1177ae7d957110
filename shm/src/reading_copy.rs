//! Copies of pieces that are computed over at once, out of memory that is in no cache.
//!
//! The processor fetches ahead by itself, but not past a page's end, and not while it computes. So each line that is
//! copied asks for the one two pages further on: then a checksum over copies costs hardly more than over the memory itself.

use std::ptr;

const LINE: usize = 64;
/// How far ahead is fetched: of 2, 4 and 8 KiB the most is the best.
const AHEAD: usize = 8 << 10;

/// Copies `len` bytes into the caches.
///
/// # Safety
/// As for [`ptr::copy_nonoverlapping`], except that the source may be changed by other processes meanwhile. Of what lies
/// behind it nothing is accessed.
pub(crate) unsafe fn reading_copy(from: *const u8, to: *mut u8, len: usize) {
    let whole = len / LINE * LINE;
    for at in (0..whole).step_by(LINE) {
        fetch(from.wrapping_add(at + AHEAD));
        // SAFETY: inside both ranges, by the caller's promise.
        unsafe { ptr::copy_nonoverlapping(from.add(at).cast::<[u8; LINE]>(), to.add(at).cast(), 1) };
    }
    // SAFETY: as above.
    unsafe { ptr::copy_nonoverlapping(from.add(whole), to.add(whole), len - whole) }
}

/// Has a line come closer; any address will do.
fn fetch(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint: it neither accesses memory nor faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}
