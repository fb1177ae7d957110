//! Memory of a GPU behind a file descriptor: it lives as long as anybody holds a descriptor or a mapping, so a pool
//! outlives the process that works in it.
//!
//! ```text
//!   create ──► [allocation] ◄── import(descriptor)
//!                  │  map at a reserved range of addresses, allow access
//!                  ▼
//!              VmmMemory ── export ──► descriptor, to be passed to another process
//! ```

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use crate::sys::{call, cu};
use crate::{Context, DeviceAddress, DeviceRange, Error};

/// A mapped allocation that can be exported.
#[derive(Debug)]
pub struct VmmMemory {
    context: Context,
    allocation: Allocation,
    address: DeviceAddress,
    bytes: usize,
}

/// A share in the allocation itself.
#[derive(Debug)]
struct Allocation(cu::CUmemGenericAllocationHandle);

/// Reserved addresses.
struct Reservation {
    address: cu::CUdeviceptr,
    bytes: usize,
}

impl VmmMemory {
    /// Allocates and maps at least `bytes`, rounded up to the GPU's granularity. The bytes are whatever they were.
    pub fn create(context: &Context, bytes: usize) -> Result<Self, Error> {
        let bytes = round_up(bytes, Self::granularity(context)?)?;
        let properties = properties(context);
        let mut handle = 0;
        // SAFETY: writes one handle, which `Allocation` releases.
        unsafe { call!(cuMemCreate(&mut handle, bytes, &properties, 0)) }?;
        Self::map(context, Allocation(handle), bytes)
    }

    /// Maps memory that another process created. `bytes` is its [`DeviceRange::bytes`] there. The descriptor is not kept.
    pub fn import(context: &Context, descriptor: BorrowedFd<'_>, bytes: usize) -> Result<Self, Error> {
        let granularity = Self::granularity(context)?;
        if bytes == 0 || !bytes.is_multiple_of(granularity) {
            let reason = format!("its size of {bytes} bytes is not a positive multiple of {granularity}");
            return Err(Error::refused("memory of a GPU", reason));
        }
        context.bind()?;
        let mut handle = 0;
        // The driver takes the number itself for the pointer.
        let number = ptr::without_provenance_mut(descriptor.as_raw_fd() as usize);
        // SAFETY: writes one handle, which `Allocation` releases; the descriptor is open during the call, and the driver
        // refuses those that are not its own.
        unsafe { call!(cuMemImportFromShareableHandle(&mut handle, number, HANDLE_TYPE)) }?;
        Self::map(context, Allocation(handle), bytes)
    }

    /// A descriptor for another process.
    pub fn export(&self) -> Result<OwnedFd, Error> {
        self.context.bind()?;
        let mut descriptor: i32 = -1;
        let target = ptr::from_mut(&mut descriptor).cast();
        // SAFETY: for this type of handle the driver writes one int.
        unsafe { call!(cuMemExportToShareableHandle(target, self.allocation.0, HANDLE_TYPE, 0)) }?;
        // SAFETY: a fresh descriptor that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
    }

    /// What sizes are rounded up to, bytes.
    pub fn granularity(context: &Context) -> Result<usize, Error> {
        context.bind()?;
        let mut bytes = 0;
        let which = cu::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
        let properties = properties(context);
        // SAFETY: writes one number.
        unsafe { call!(cuMemGetAllocationGranularity(&mut bytes, &properties, which)) }?;
        Ok(bytes)
    }

    /// Lets another GPU of this process reach the memory too.
    pub fn allow(&self, other: &Context) -> Result<(), Error> {
        self.context.bind()?;
        let access = access(other);
        // SAFETY: the range is ours, and mapped.
        unsafe { call!(cuMemSetAccess(self.address.0, self.bytes, &access, 1)) }
    }

    fn map(context: &Context, allocation: Allocation, bytes: usize) -> Result<Self, Error> {
        context.bind()?;
        let mut address = 0;
        // SAFETY: writes one address; only addresses, nothing behind them yet.
        unsafe { call!(cuMemAddressReserve(&mut address, bytes, 0, 0, 0)) }?;
        let reservation = Reservation { address, bytes };
        // SAFETY: the range was just reserved and is free; the driver checks the size of the allocation.
        unsafe { call!(cuMemMap(address, bytes, 0, allocation.0, 0)) }?;
        std::mem::forget(reservation);
        let mapped = Self { context: context.clone(), allocation, address: DeviceAddress(address), bytes };
        mapped.allow(context)?;
        Ok(mapped)
    }
}

const HANDLE_TYPE: cu::CUmemAllocationHandleType =
    cu::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

fn location(context: &Context) -> cu::CUmemLocation {
    cu::CUmemLocation { type_: cu::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: context.handle() }
}

fn properties(context: &Context) -> cu::CUmemAllocationProp {
    cu::CUmemAllocationProp {
        type_: cu::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: HANDLE_TYPE,
        location: location(context),
        win32HandleMetaData: ptr::null_mut(),
        allocFlags: cu::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

fn access(context: &Context) -> cu::CUmemAccessDesc {
    cu::CUmemAccessDesc {
        location: location(context),
        flags: cu::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
    }
}

fn round_up(bytes: usize, granularity: usize) -> Result<usize, Error> {
    let rounded = bytes.checked_next_multiple_of(granularity).filter(|rounded| *rounded > 0);
    rounded.ok_or_else(|| Error::refused("an allocation", format!("of {bytes} bytes")))
}

impl DeviceRange for VmmMemory {
    fn let_in(&self, other: &Context) -> Result<(), Error> {
        if other.device().uuid == self.context.device().uuid {
            return Ok(());
        }
        crate::memory::check_way(other, &self.context)?;
        self.allow(other)
    }

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

impl Drop for VmmMemory {
    fn drop(&mut self) {
        // Unlike freeing, unmapping does not wait for copies under way.
        let _ = self.context.synchronize();
        // SAFETY: mapped by `map`, unmapped once; nothing on the GPU uses it any more.
        let _ = unsafe { call!(cuMemUnmap(self.address.0, self.bytes)) };
        drop(Reservation { address: self.address.0, bytes: self.bytes });
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: reserved with this size, nothing is mapped there.
        let _ = unsafe { call!(cuMemAddressFree(self.address, self.bytes)) };
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: created or imported once. The memory itself goes when no mapping and no descriptor is left.
        let _ = unsafe { call!(cuMemRelease(self.0)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_rounded_up_and_impossible_ones_refused() {
        assert_eq!(round_up(1, 2 << 20).unwrap(), 2 << 20);
        assert_eq!(round_up(4 << 20, 2 << 20).unwrap(), 4 << 20);
        assert!(round_up(0, 2 << 20).is_err());
        assert!(round_up(usize::MAX, 2 << 20).is_err());
    }
}
