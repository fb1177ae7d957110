//! One memfd, sealed against any change of size, mapped whole.
//!
//! Invariant: the mapping covers exactly `bytes` of a file that can neither shrink nor grow, so an access inside the
//! bounds never raises SIGBUS. Every access here checks its bounds. Aliasing: the bytes are only ever touched through
//! raw copies and atomics, never through references.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::{ffi, io};

use rustix::fs::{self, MemfdFlags, SealFlags};
use rustix::mm::{self, Advice, MapFlags, ProtFlags};

use crate::Error;
use crate::reading_copy::reading_copy;
use crate::streaming_copy::{settle, streaming_copy};

/// File system of ordinary memfds.
const TMPFS_MAGIC: fs::FsWord = 0x0102_1994;
/// Bytes that [`SharedMemory::for_each_piece`] copies out at a time: they stay in the first-level cache.
const PIECE_BYTES: usize = 4 << 10;

/// Bytes of a large page on every processor that we run on.
pub const LARGE_PAGE: usize = 2 << 20;

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

/// Copies of one thread that are finished together, when this is dropped: then others see them. Waiting for each by itself
/// costs a tenth of the time of a copy of 64 KiB.
#[derive(Debug, Default)]
pub struct Copies(());

impl Drop for Copies {
    fn drop(&mut self) {
        settle();
    }
}

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

    /// Seals a memfd of this process against any change of size, so that others may map it. Returns its size in bytes.
    pub fn seal(fd: BorrowedFd<'_>) -> Result<u64, Error> {
        fs::fcntl_add_seals(fd, Self::SEALS).map_err(Error::system("seal", "memfd"))?;
        let size = fs::fstat(fd).map_err(Error::system("stat", "memfd"))?.st_size;
        u64::try_from(size).map_err(|_| Error::refused(format!("its size of {size} bytes is not usable")))
    }

    const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

    fn map(fd: OwnedFd, bytes: usize) -> Result<Self, Error> {
        let base = map_aligned(&fd, bytes)
            .map_err(Error::system("map", format!("{bytes} bytes of shared memory")))?;
        let base = NonNull::new(base.cast::<u8>()).expect("mmap never returns null without MAP_FIXED");
        let memory = Self { fd, base, bytes };
        // Large pages halve the cost of populating and of scattered copies; kernels without them ignore the advice.
        // SAFETY: the range is our own mapping.
        let _ = unsafe { mm::madvise(memory.base.as_ptr().cast(), bytes, Advice::LinuxHugepage) };
        Ok(memory)
    }

    /// Names the memory behind a descriptor, among all there is as long as the descriptor is open.
    pub fn id_of(fd: BorrowedFd<'_>) -> Result<(u64, u64), Error> {
        let stat = fs::fstat(fd).map_err(Error::system("stat", "memfd"))?;
        Ok((stat.st_dev, stat.st_ino))
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

    /// Asks for large pages behind `range`, which keeps its bytes, whatever the system's settings for shared memory are.
    /// Drives read into one large page faster than into 512 scattered small ones. Best effort: without the right
    /// kernel (6.1) or enough contiguous memory, all or some of the pages stay small.
    pub fn gather(&self, range: Range<usize>) {
        self.check(range.start, range.len());
        let (start, end) = (range.start.next_multiple_of(LARGE_PAGE), range.end / LARGE_PAGE * LARGE_PAGE);
        for large in (start..end).step_by(LARGE_PAGE) {
            let address = self.base.as_ptr().wrapping_add(large).cast();
            // The kernel gathers only where there is something.
            // SAFETY: a page within our mapping.
            let _ = unsafe { mm::madvise(address, 4096, Advice::LinuxPopulateWrite) };
            // SAFETY: the range lies within our mapping, and the advice keeps its bytes.
            let _ = unsafe { libc::madvise(address.cast(), LARGE_PAGE, libc::MADV_COLLAPSE) };
        }
    }

    /// Asks that pages which are not there yet come from a node of the machine's memory, as far as it has room. For all
    /// processes that map the memory.
    pub fn prefer_node(&self, node: u32) -> Result<(), Error> {
        /// The kernel's "from there if possible".
        const MPOL_PREFERRED: libc::c_int = 1;
        const NODES_MAX: usize = 1024;
        let mut mask = [0u64; NODES_MAX / 64];
        let word = mask.get_mut(node as usize / 64);
        *word.ok_or_else(|| Error::refused(format!("there is no node {node}")))? |= 1 << (node % 64);
        // SAFETY: the range is our own mapping; the kernel reads one bit less than it is told, which is all of the mask.
        let done = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.base.as_ptr(),
                self.bytes,
                MPOL_PREFERRED,
                mask.as_ptr(),
                NODES_MAX + 1,
                0,
            )
        };
        if done == 0 {
            return Ok(());
        }
        let source = io::Error::last_os_error();
        Err(Error::System { call: "prefer a node for", what: format!("{} bytes", self.bytes), source })
    }

    /// Copies bytes out.
    pub fn read(&self, offset: usize, to: &mut [u8]) {
        self.check(offset, to.len());
        // SAFETY: in bounds of our mapping; `to` is exclusively ours and cannot overlap the mapping.
        unsafe { ptr::copy_nonoverlapping(self.base.as_ptr().add(offset), to.as_mut_ptr(), to.len()) }
    }

    /// Shows copies of the bytes [offset, offset + len), a piece at a time and in order, to compute over them. Bytes that
    /// somebody changes meanwhile are seen in any state.
    pub fn for_each_piece(&self, offset: usize, len: usize, mut each: impl FnMut(&[u8])) {
        self.check(offset, len);
        let mut piece = [0; PIECE_BYTES];
        for start in (0..len).step_by(PIECE_BYTES) {
            let piece = &mut piece[..PIECE_BYTES.min(len - start)];
            // SAFETY: in bounds of our mapping, as just checked; `piece` is exclusively ours and cannot overlap the mapping.
            unsafe {
                reading_copy(self.base.as_ptr().add(offset + start), piece.as_mut_ptr(), piece.len());
            }
            each(piece);
        }
    }

    /// Copies bytes in.
    pub fn write(&self, offset: usize, from: &[u8]) {
        self.check(offset, from.len());
        // SAFETY: in bounds of our mapping; `from` cannot overlap it, because no references to it exist.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), self.base.as_ptr().add(offset), from.len()) }
    }

    /// Copies `len` bytes to another memory. The two must not be the same memory. Long copies leave the caches alone.
    pub fn copy_to(&self, offset: usize, to: &SharedMemory, to_offset: usize, len: usize) {
        let (from, to) = self.ends(offset, to, to_offset, len);
        // SAFETY: both ranges are in bounds of their mappings, and distinct mappings do not overlap in address space.
        unsafe { streaming_copy(from, to, len, ptr::null()) }
        settle();
    }

    /// As [`SharedMemory::copy_to`], but others are sure to see it only when `copies` is dropped. `next` is where in this
    /// memory the copy after this one begins, if it is as long.
    pub fn copy_in(
        &self,
        _copies: &Copies,
        offset: usize,
        (to, to_offset): (&SharedMemory, usize),
        len: usize,
        next: Option<usize>,
    ) {
        let (from, to) = self.ends(offset, to, to_offset, len);
        let next = next.map_or(ptr::null(), |next| {
            self.check(next, len);
            // SAFETY: in bounds of our mapping.
            unsafe { self.base.as_ptr().add(next).cast_const() }
        });
        // SAFETY: as for `copy_to`.
        unsafe { streaming_copy(from, to, len, next) }
    }

    /// The same by the C library's memcpy, whatever the length: what [`SharedMemory::copy_to`] is measured against.
    pub fn memcpy_to(&self, offset: usize, to: &SharedMemory, to_offset: usize, len: usize) {
        let (from, to) = self.ends(offset, to, to_offset, len);
        // SAFETY: as for `copy_to`.
        unsafe { ptr::copy_nonoverlapping(from, to, len) }
    }

    /// Address of `len` bytes at `offset`, whose bounds are checked.
    pub(crate) fn at(&self, offset: usize, len: usize) -> *mut u8 {
        self.check(offset, len);
        // SAFETY: in bounds of our mapping.
        unsafe { self.base.as_ptr().add(offset) }
    }

    /// Addresses of a copy, whose bounds are checked.
    fn ends(&self, offset: usize, to: &SharedMemory, to_offset: usize, len: usize) -> (*const u8, *mut u8) {
        self.check(offset, len);
        to.check(to_offset, len);
        // SAFETY: both offsets are in bounds of their mappings.
        unsafe { (self.base.as_ptr().add(offset), to.base.as_ptr().add(to_offset)) }
    }

    /// Reads from a file into `len` bytes at `offset`: one call to the kernel, which may move fewer bytes. Returns how
    /// many it moved.
    pub fn read_from_file(
        &self,
        offset: usize,
        len: usize,
        file: impl AsFd,
        file_offset: u64,
    ) -> io::Result<usize> {
        self.check(offset, len);
        let position = file_position(file_offset)?;
        // SAFETY: the range is in bounds of our mapping, and the kernel writes to it as any other sharer of it does.
        let moved = unsafe {
            libc::pread64(file.as_fd().as_raw_fd(), self.base.as_ptr().add(offset).cast(), len, position)
        };
        usize::try_from(moved).map_err(|_| io::Error::last_os_error())
    }

    /// Writes `len` bytes at `offset` to a file: one call to the kernel, which may move fewer bytes. Returns how many it
    /// moved.
    pub fn write_to_file(
        &self,
        offset: usize,
        len: usize,
        file: impl AsFd,
        file_offset: u64,
    ) -> io::Result<usize> {
        self.check(offset, len);
        let position = file_position(file_offset)?;
        // SAFETY: the range is in bounds of our mapping; the kernel only reads it.
        let moved = unsafe {
            libc::pwrite64(file.as_fd().as_raw_fd(), self.base.as_ptr().add(offset).cast(), len, position)
        };
        usize::try_from(moved).map_err(|_| io::Error::last_os_error())
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

/// Maps a file whole, so that large pages of the file can be large pages of the mapping.
fn map_aligned(fd: &OwnedFd, bytes: usize) -> rustix::io::Result<*mut ffi::c_void> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    let room = bytes.checked_add(LARGE_PAGE).ok_or(rustix::io::Errno::NOMEM)?;
    if bytes < LARGE_PAGE {
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing of ours.
        return unsafe { mm::mmap(ptr::null_mut(), bytes, access, MapFlags::SHARED, fd, 0) };
    }
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: as above; only addresses, nothing behind them.
    let reserved = unsafe { mm::mmap_anonymous(ptr::null_mut(), room, ProtFlags::empty(), flags) }?;
    let before = reserved.addr().next_multiple_of(LARGE_PAGE) - reserved.addr();
    let base = reserved.wrapping_byte_add(before);
    // SAFETY: replaces a part of what was just reserved, which nobody else knows of.
    let mapped = unsafe { mm::mmap(base, bytes, access, MapFlags::SHARED | MapFlags::FIXED, fd, 0) };
    let (keep_from, keep_to) = if mapped.is_ok() { (before, before + bytes) } else { (room, room) };
    for (start, end) in [(0, keep_from), (keep_to, room)] {
        if start < end {
            // SAFETY: the rest of what was reserved.
            unsafe { mm::munmap(reserved.wrapping_byte_add(start), end - start) }?;
        }
    }
    mapped
}

/// An offset in a file, as the kernel takes it.
fn file_position(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
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
    fn memory_on_a_node_is_as_any_other_and_one_that_is_not_there_is_refused() {
        let a = SharedMemory::create("test", 1 << 20).unwrap();
        // Some containers do not permit the call at all.
        match a.prefer_node(0) {
            Ok(()) => {}
            Err(Error::System { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {}
            Err(Error::System { source, .. }) if source.raw_os_error() == Some(libc::ENOSYS) => {}
            Err(other) => panic!("{other}"),
        }
        a.populate(0..1 << 20).unwrap();
        a.write(5000, b"hello");
        let mut seen = [0; 5];
        a.read(5000, &mut seen);
        assert_eq!(&seen, b"hello");
        assert!(a.prefer_node(1023).is_err() && a.prefer_node(5000).is_err());
    }

    #[test]
    fn a_large_mapping_is_aligned_and_gathering_it_keeps_the_bytes() {
        let bytes = 5 << 20;
        let a = SharedMemory::create("test", bytes).unwrap();
        assert!(a.address().addr().get().is_multiple_of(LARGE_PAGE));
        a.write((2 << 20) + 5000, b"hello");
        a.gather(4096..bytes);
        a.populate(0..bytes).unwrap();
        let mut seen = [0; 5];
        a.read((2 << 20) + 5000, &mut seen);
        assert_eq!(&seen, b"hello");
        a.read(bytes - 5, &mut seen);
        assert_eq!(seen, [0; 5]);
    }

    #[test]
    fn bytes_go_to_a_file_and_come_back_and_a_read_at_its_end_is_short() {
        let file = tempfile::tempfile().unwrap();
        let a = SharedMemory::create("test", 8192).unwrap();
        a.write(100, b"hello");
        assert_eq!(a.write_to_file(100, 5, &file, 7000).unwrap(), 5);
        assert_eq!(a.read_from_file(4096, 4096, &file, 7001).unwrap(), 4);
        let mut seen = [1; 5];
        a.read(4096, &mut seen);
        assert_eq!(&seen, b"ello\0");
        assert_eq!(a.read_from_file(0, 16, &file, 7005).unwrap(), 0);
    }

    #[test]
    fn what_the_kernel_refuses_is_an_error() {
        let a = SharedMemory::create("test", 4096).unwrap();
        let read_only = std::fs::File::open("/dev/null").unwrap();
        let refused = a.write_to_file(0, 1, &read_only, 0).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EBADF));
        let refused = a.read_from_file(0, 1, &read_only, u64::MAX).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn pieces_are_all_bytes_in_order() {
        let a = SharedMemory::create("test", 1 << 20).unwrap();
        let bytes: Vec<u8> = (0..1 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        a.write(0, &bytes);
        for (offset, len) in
            [(0, 0), (1, 1), (3, 63), (5, PIECE_BYTES), (4095, PIECE_BYTES + 65), (0, 1 << 20)]
        {
            let mut seen = Vec::new();
            a.for_each_piece(offset, len, |piece| seen.extend_from_slice(piece));
            assert!(seen == bytes[offset..offset + len], "{offset} {len}");
        }
    }

    #[test]
    #[should_panic(expected = "lies outside")]
    fn a_file_is_not_read_past_the_memory() {
        let a = SharedMemory::create("test", 4096).unwrap();
        let _ = a.read_from_file(4000, 97, std::fs::File::open("/dev/zero").unwrap(), 0);
    }

    #[test]
    #[should_panic(expected = "lies outside")]
    fn pieces_out_of_bounds_are_caught_before_any_is_shown() {
        let a = SharedMemory::create("test", 32 << 10).unwrap();
        a.for_each_piece(4096, 32 << 10, |_| unreachable!());
    }

    #[test]
    #[should_panic(expected = "lies outside")]
    fn out_of_bounds_is_caught() {
        let a = SharedMemory::create("test", 4096).unwrap();
        a.write(4090, &[0; 7]);
    }

    #[test]
    fn long_copies_arrive_whole_at_odd_offsets() {
        let bytes = 1 << 20;
        let (a, b) = (SharedMemory::create("a", bytes).unwrap(), SharedMemory::create("b", bytes).unwrap());
        let pattern: Vec<u8> = (0..bytes).map(|at| (at % 253) as u8).collect();
        a.write(0, &pattern);
        let (from, to, len) = (4099, 77, bytes - 5000);
        for copy in [SharedMemory::copy_to, SharedMemory::memcpy_to] {
            b.write(0, &vec![0xEE; bytes]);
            copy(&a, from, &b, to, len);
            let mut seen = vec![0; bytes];
            b.read(0, &mut seen);
            assert!(seen[to..to + len] == pattern[from..from + len]);
            assert!(seen[..to].iter().chain(&seen[to + len..]).all(|byte| *byte == 0xEE));
        }
    }

    #[test]
    #[should_panic(expected = "lies outside")]
    fn a_long_copy_from_outside_is_caught() {
        let (a, b) = (SharedMemory::create("a", 65536).unwrap(), SharedMemory::create("b", 131_072).unwrap());
        a.copy_to(1, &b, 0, 65536);
    }

    #[test]
    #[should_panic(expected = "lies outside")]
    fn a_long_copy_to_outside_is_caught() {
        let (a, b) = (SharedMemory::create("a", 131_072).unwrap(), SharedMemory::create("b", 65536).unwrap());
        a.copy_to(0, &b, usize::MAX, 65536);
    }
}
