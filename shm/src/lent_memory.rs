//! Memory of this process that somebody else allocated and lends us: an engine's KV pool.
//!
//! Only raw copies to and from shared memory, inside checked bounds. What the owner does with the bytes meanwhile can
//! tear a copy, which is the caller's protocol to notice, but never memory safety.

use std::ptr::{self, NonNull};

use crate::streaming_copy::{settle, streaming_copy};
use crate::{Error, SharedMemory};

/// Lent memory.
#[derive(Debug)]
pub struct LentMemory {
    base: NonNull<u8>,
    bytes: usize,
    _owner: Option<SharedMemory>,
}

// SAFETY: whoever lends the memory promises (see `new`) that it may be accessed from any thread.
unsafe impl Send for LentMemory {}
// SAFETY: as above; only raw copies touch it.
unsafe impl Sync for LentMemory {}

impl LentMemory {
    /// Borrows `bytes` at `address`.
    ///
    /// # Safety
    /// The range is mapped, readable and writable, for as long as this value lives, no Rust reference to any of it
    /// exists meanwhile, and it is no part of a [`SharedMemory`] that is copied from or to.
    pub unsafe fn new(address: usize, bytes: usize) -> Result<Self, Error> {
        let base = NonNull::new(ptr::with_exposed_provenance_mut::<u8>(address));
        let base = base.filter(|_| address.checked_add(bytes).is_some());
        let base =
            base.ok_or_else(|| Error::refused(format!("{bytes} bytes at {address:#x} are no memory")))?;
        Ok(Self { base, bytes, _owner: None })
    }

    /// Lends a mapping that nobody else has. What it maps may be mapped elsewhere too.
    pub fn of_shared(memory: SharedMemory) -> Self {
        Self { base: memory.address(), bytes: memory.bytes(), _owner: Some(memory) }
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies `len` bytes in. All threads see them when it returns.
    pub fn copy_from(&self, offset: usize, from: &SharedMemory, from_offset: usize, len: usize) {
        let (to, from) = (self.at(offset, len), from.at(from_offset, len));
        // SAFETY: both ranges are in bounds, and the lender promised that they are distinct memory.
        unsafe { streaming_copy(from, to, len, ptr::null()) }
        settle();
    }

    /// Copies `len` bytes out. All threads and processes see them when it returns.
    pub fn copy_to(&self, offset: usize, to: &SharedMemory, to_offset: usize, len: usize) {
        let (from, to) = (self.at(offset, len), to.at(to_offset, len));
        // SAFETY: as for `copy_from`.
        unsafe { streaming_copy(from, to, len, ptr::null()) }
        settle();
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.bytes),
            "[{offset}, +{len}) lies outside {} lent bytes",
            self.bytes
        );
        // SAFETY: in bounds of what was lent.
        unsafe { self.base.as_ptr().add(offset) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_in_and_out_within_bounds() {
        let mut lent = vec![0u8; 10_000];
        // SAFETY: the vector outlives the borrow and is not touched meanwhile.
        let memory = unsafe { LentMemory::new(lent.as_mut_ptr().expose_provenance(), lent.len()) }.unwrap();
        let shared = SharedMemory::create("test", 8192).unwrap();
        shared.write(100, b"hello");
        memory.copy_from(9_000, &shared, 100, 5);
        memory.copy_to(9_000, &shared, 4096, 5);
        let mut seen = [0; 5];
        shared.read(4096, &mut seen);
        assert_eq!(&seen, b"hello");
        let outside = std::panic::catch_unwind(|| memory.copy_to(9_998, &shared, 0, 5));
        assert!(outside.is_err());
        // SAFETY: refused before anything is accessed.
        assert!(unsafe { LentMemory::new(0, 5) }.is_err());
        drop(memory);
        assert_eq!(&lent[9_000..9_005], b"hello");
    }
}
