//! One memfd, sealed against any change of size, mapped whole.
//!
//! Invariant: the mapping covers exactly `bytes` of a file that can neither shrink nor grow, so an access inside the
//! bounds never raises SIGBUS. Every access here checks its bounds. Aliasing: the bytes are only ever touched through
//! raw copies and atomics, never through references.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::fs::{self, MemfdFlags, SealFlags};
use rustix::mm::{self, Advice, MapFlags, ProtFlags};

use crate::Error;

/// File system of ordinary memfds.
const TMPFS_MAGIC: fs::FsWord = 0x0102_1994;

/// Memory that several processes map.
#[derive(Debug)]
pub struct SharedMemory {
    fd: OwnedFd,
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: `base` points to a mapping that lives as long as `self` and is only accessed by raw copies and atomics.
unsafe impl Send for SharedMemory {}
// SAFETY: as above; concurrent copies may tear bytes, which is the caller's protocol to prevent, but never memory safety.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Creates and maps `bytes` of zeroed memory (a positive multiple of 4096). Pages are not populated yet.
    pub fn create(name: &str, bytes: usize) -> Result<Self, Error> {
        if bytes == 0 || !bytes.is_multiple_of(4096) {
            return Err(Error::refused(format!("{bytes} bytes is not a positive multiple of 4096")));
        }
        let fd = fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(Error::system("create memfd", name))?;
        fs::ftruncate(&fd, bytes as u64).map_err(Error::system("size memfd", name))?;
        fs::fcntl_add_seals(&fd, Self::SEALS).map_err(Error::system("seal memfd", name))?;
        Self::map(fd, bytes)
    }

    /// Maps memory received from another process, if it is sealed as [`SharedMemory::create`] seals it.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, Error> {
        let seals =
            fs::fcntl_get_seals(&fd).map_err(Error::system("read seals of", "received descriptor"))?;
        if !seals.contains(Self::SEALS) {
            return Err(Error::refused(format!("it is not sealed against resizing (seals {seals:?})")));
        }
        // Pages of other file systems (huge pages above all) may turn out not to be there when they are touched.
        let system = fs::fstatfs(&fd).map_err(Error::system("stat file system of", "received descriptor"))?;
        if system.f_type != TMPFS_MAGIC {
            return Err(Error::refused("it is not ordinary shared memory"));
        }
        let size = fs::fstat(&fd).map_err(Error::system("stat", "received descriptor"))?.st_size;
        let bytes = usize::try_from(size).ok().filter(|bytes| *bytes > 0 && bytes.is_multiple_of(4096));
        let bytes = bytes.ok_or_else(|| Error::refused(format!("its size of {size} bytes is not usable")))?;
        Self::map(fd, bytes)
    }

    const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

    fn map(fd: OwnedFd, bytes: usize) -> Result<Self, Error> {
        // SAFETY: a fresh shared mapping at an address of the kernel's choice aliases nothing of ours.
        let base = unsafe {
            mm::mmap(ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &fd, 0)
        }
        .map_err(Error::system("map", format!("{bytes} bytes of shared memory")))?;
        let base = NonNull::new(base.cast::<u8>()).expect("mmap never returns null without MAP_FIXED");
        let memory = Self { fd, base, bytes };
        // Large pages halve the cost of populating and of scattered copies; kernels without them ignore the advice.
        // SAFETY: the range is our own mapping.
        let _ = unsafe { mm::madvise(memory.base.as_ptr().cast(), bytes, Advice::LinuxHugepage) };
        Ok(memory)
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The descriptor, to be passed to another process.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Address of byte 0. It stays valid as long as `self`.
    pub fn address(&self) -> NonNull<u8> {
        self.base
    }

    /// Makes the kernel provide the pages of `range` now, so that later accesses neither fault nor fail.
    pub fn populate(&self, range: Range<usize>) -> Result<(), Error> {
        self.check(range.start, range.len());
        // SAFETY: the range lies within our mapping.
        let done = unsafe {
            mm::madvise(self.base.add(range.start).as_ptr().cast(), range.len(), Advice::LinuxPopulateWrite)
        };
        done.map_err(Error::system("populate", format!("{} bytes of shared memory", range.len())))
    }

    /// Copies bytes out.
    pub fn read(&self, offset: usize, to: &mut [u8]) {
        self.check(offset, to.len());
        // SAFETY: in bounds of our mapping; `to` is exclusively ours and cannot overlap the mapping.
        unsafe { ptr::copy_nonoverlapping(self.base.as_ptr().add(offset), to.as_mut_ptr(), to.len()) }
    }

    /// Copies bytes in.
    pub fn write(&self, offset: usize, from: &[u8]) {
        self.check(offset, from.len());
        // SAFETY: in bounds of our mapping; `from` cannot overlap it, because no references to it exist.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), self.base.as_ptr().add(offset), from.len()) }
    }

    /// Copies `len` bytes to another memory. The two must not be the same memory.
    pub fn copy_to(&self, offset: usize, to: &SharedMemory, to_offset: usize, len: usize) {
        self.check(offset, len);
        to.check(to_offset, len);
        // SAFETY: both ranges are in bounds of their mappings, and distinct mappings do not overlap in address space.
        unsafe {
            ptr::copy_nonoverlapping(self.base.as_ptr().add(offset), to.base.as_ptr().add(to_offset), len);
        }
    }

    /// A shared 64-bit word at an 8-aligned offset.
    pub fn word64(&self, offset: usize) -> &AtomicU64 {
        self.check(offset, 8);
        assert_eq!(offset % 8, 0, "shared word must be aligned");
        // SAFETY: in bounds, aligned (the mapping is page-aligned), and shared words are only accessed atomically.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }

    /// A shared 32-bit word at a 4-aligned offset.
    pub fn word32(&self, offset: usize) -> &AtomicU32 {
        self.check(offset, 4);
        assert_eq!(offset % 4, 0, "shared word must be aligned");
        // SAFETY: as for `word64`.
        unsafe { AtomicU32::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }

    fn check(&self, offset: usize, len: usize) {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.bytes),
            "[{offset}, +{len}) lies outside {} shared bytes",
            self.bytes
        );
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: our own mapping, unmapped once; nobody holds an address beyond the life of `self`.
        let _ = unsafe { mm::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_see_each_others_bytes() {
        let a = SharedMemory::create("test", 8192).unwrap();
        let b = SharedMemory::from_fd(a.fd().try_clone_to_owned().unwrap()).unwrap();
        a.write(5000, b"hello");
        let mut seen = [0; 5];
        b.read(5000, &mut seen);
        assert_eq!(&seen, b"hello");
        let c = SharedMemory::create("test", 4096).unwrap();
        b.copy_to(5000, &c, 17, 5);
        c.read(17, &mut seen);
        assert_eq!(&seen, b"hello");
    }

    #[test]
    fn size_is_sealed() {
        let a = SharedMemory::create("test", 8192).unwrap();
        assert!(fs::ftruncate(a.fd(), 4096).is_err());
        assert!(fs::ftruncate(a.fd(), 1 << 20).is_err());
        assert!(fs::fcntl_add_seals(a.fd(), SealFlags::WRITE).is_err());
    }

    #[test]
    fn unsealed_memory_is_refused() {
        let fd = fs::memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        fs::ftruncate(&fd, 4096).unwrap();
        assert!(matches!(SharedMemory::from_fd(fd), Err(Error::Refused { .. })));
    }

    #[test]
    fn populated_memory_reads_as_zero() {
        let a = SharedMemory::create("test", 1 << 20).unwrap();
        a.populate(0..1 << 20).unwrap();
        let mut byte = [1];
        a.read((1 << 20) - 1, &mut byte);
        assert_eq!(byte, [0]);
    }

    #[test]
    #[should_panic(expected = "lies outside")]
    fn out_of_bounds_is_caught() {
        let a = SharedMemory::create("test", 4096).unwrap();
        a.write(4090, &[0; 7]);
    }
}
