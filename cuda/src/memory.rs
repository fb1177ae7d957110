//! Memory of a GPU that CUDA allocated for this process.

use std::fmt;
use std::sync::Arc;

use crate::sys::call;
use crate::{Context, Error};

/// A place in the address space that GPUs and this process share. Whether anything is there is another question.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct DeviceAddress(pub u64);

impl DeviceAddress {
    /// So many bytes further on.
    pub fn plus(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

impl fmt::Debug for DeviceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::DeviceMemory {}
    impl Sealed for crate::VmmMemory {}
    impl Sealed for crate::IpcMemory {}
}

/// Mapped memory of a GPU, whoever allocated it. It stays mapped as long as the value lives.
pub trait DeviceRange: sealed::Sealed + fmt::Debug + Send + Sync + 'static {
    /// The GPU through which it is mapped.
    fn context(&self) -> &Context;

    /// Address of its first byte.
    fn address(&self) -> DeviceAddress;

    /// Size in bytes.
    fn bytes(&self) -> usize;

    /// Lets another GPU of this process read and write it, for as long as it is mapped. Refused where the two have no way to
    /// each other.
    fn let_in(&self, other: &Context) -> Result<(), Error> {
        if other.device().uuid == self.context().device().uuid {
            return Ok(());
        }
        check_way(other, self.context())?;
        other.reach(self.context())
    }

    /// This memory as another GPU of this process is to copy out of it, which it lets in. `None`: as it is here. Else it is
    /// mapped there in its own right.
    fn seen_by(&self, other: &Context) -> Result<Option<Arc<dyn DeviceRange>>, Error> {
        self.let_in(other).map(|()| None)
    }

    /// Copies bytes out, and waits for it. Not ordered with streams.
    fn read(&self, offset: usize, to: &mut [u8]) -> Result<(), Error> {
        check(offset, to.len(), self.bytes());
        self.context().bind()?;
        let from = self.address().plus(offset).0;
        // SAFETY: the source lies within mapped memory, the target is exclusively ours.
        unsafe { call!(cuMemcpyDtoH_v2(to.as_mut_ptr().cast(), from, to.len())) }
    }

    /// Copies bytes in, and waits for it. Not ordered with streams.
    fn write(&self, offset: usize, from: &[u8]) -> Result<(), Error> {
        check(offset, from.len(), self.bytes());
        self.context().bind()?;
        let to = self.address().plus(offset).0;
        // SAFETY: the target lies within mapped memory, to which no references exist; the source is borrowed meanwhile.
        unsafe { call!(cuMemcpyHtoD_v2(to, from.as_ptr().cast(), from.len())) }
    }

    /// Sets `bytes` bytes from `offset` on, and waits for it.
    fn fill(&self, offset: usize, byte: u8, bytes: usize) -> Result<(), Error> {
        check(offset, bytes, self.bytes());
        self.context().bind()?;
        let at = self.address().plus(offset).0;
        // SAFETY: within mapped memory, to which no references exist.
        unsafe { call!(cuMemsetD8_v2(at, byte, bytes)) }?;
        self.context().synchronize()
    }
}

/// Memory from CUDA's ordinary allocator. It can be handed to other processes by an [`crate::IpcHandle`], and then dies
/// with this one, or rather with the last of them that has it open.
#[derive(Debug)]
pub struct DeviceMemory {
    context: Context,
    address: DeviceAddress,
    bytes: usize,
}

impl DeviceMemory {
    /// Allocates. The bytes are whatever they were.
    pub fn allocate(context: &Context, bytes: usize) -> Result<Self, Error> {
        if bytes == 0 {
            return Err(Error::refused("an allocation", "of 0 bytes"));
        }
        context.bind()?;
        let mut address = 0;
        // SAFETY: writes one address, which `self` frees.
        unsafe { call!(cuMemAlloc_v2(&mut address, bytes)) }?;
        Ok(Self { context: context.clone(), address: DeviceAddress(address), bytes })
    }
}

impl DeviceRange for DeviceMemory {
    fn context(&self) -> &Context {
        &self.context
    }

    fn address(&self) -> DeviceAddress {
        self.address
    }

    fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: allocated by `allocate`, freed once. The driver waits for work that was issued on the GPU.
        let _ = unsafe { call!(cuMemFree_v2(self.address.0)) };
    }
}

/// Whether one GPU can reach the memory of another.
pub(crate) fn check_way(from: &Context, to: &Context) -> Result<(), Error> {
    if from.can_reach(to)? {
        return Ok(());
    }
    let reason = format!("GPU {} has no way to GPU {}", from.device().uuid, to.device().uuid);
    Err(Error::refused("a copy between GPUs", reason))
}

/// Panics unless [offset, offset + len) lies within `bytes` bytes.
pub(crate) fn check(offset: usize, len: usize, bytes: usize) {
    let end = offset.checked_add(len);
    assert!(end.is_some_and(|end| end <= bytes), "[{offset}, +{len}) lies outside {bytes} bytes of a GPU");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_checked_without_overflow() {
        check(0, 0, 0);
        check(4096, 4096, 8192);
        for (offset, len) in [(1, 8192), (8193, 0), (usize::MAX, 2)] {
            assert!(std::panic::catch_unwind(|| check(offset, len, 8192)).is_err(), "{offset} {len}");
        }
    }

    #[test]
    fn addresses_are_shown_in_hexadecimal() {
        assert_eq!(format!("{:?}", DeviceAddress(0x1000).plus(16)), "0x1010");
    }
}
