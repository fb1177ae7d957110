//! Memory of a GPU that another process allocated with CUDA's ordinary allocator, opened by its handle.
//!
//! When the other process dies, the memory stays mapped and right here until it is closed, which then frees it (measured).

use std::ptr;
use std::sync::Arc;

use crate::memory::check_way;
use crate::sys::{call, cu};
use crate::{Context, DeviceAddress, DeviceMemory, DeviceRange, Error};

/// Names an allocation of one process to the others of the machine. It is only bytes: send it any way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IpcHandle(pub [u8; 64]);

impl IpcHandle {
    /// The name of the allocation that has `address` in it, whoever of this process allocated it; where it begins, and how
    /// many bytes it has. Refused for memory that CUDA's ordinary allocator did not make.
    pub fn of(context: &Context, address: DeviceAddress) -> Result<(Self, DeviceAddress, usize), Error> {
        context.bind()?;
        let (mut base, mut bytes) = (0, 0);
        // SAFETY: writes two numbers; the driver refuses addresses that it does not know.
        unsafe { call!(cuMemGetAddressRange_v2(ptr::from_mut(&mut base), &mut bytes, address.0)) }?;
        let mut handle = cu::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: writes one handle, for an allocation that is there.
        unsafe { call!(cuIpcGetMemHandle(&mut handle, base)) }?;
        Ok((Self(handle.reserved.map(|byte| byte as u8)), DeviceAddress(base), bytes))
    }
}

impl DeviceMemory {
    /// The name of this allocation for other processes. It must not be freed while one of them has it open.
    pub fn ipc_handle(&self) -> Result<IpcHandle, Error> {
        self.context().bind()?;
        let mut handle = cu::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: writes one handle; the allocation is ours.
        unsafe { call!(cuIpcGetMemHandle(&mut handle, self.address().0)) }?;
        Ok(IpcHandle(handle.reserved.map(|byte| byte as u8)))
    }
}

/// Memory of another process.
#[derive(Debug)]
pub struct IpcMemory {
    context: Context,
    address: DeviceAddress,
    bytes: usize,
    handle: IpcHandle,
}

impl IpcMemory {
    /// Opens it. At least `bytes` must be there: less is refused. A process cannot open its own memory.
    pub fn open(context: &Context, handle: IpcHandle, bytes: usize) -> Result<Self, Error> {
        context.bind()?;
        let mut address = 0;
        let name = cu::CUipcMemHandle { reserved: handle.0.map(|byte| byte as std::ffi::c_char) };
        let flags = cu::CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        // SAFETY: writes one address, which `self` closes; the driver refuses handles that it did not make.
        unsafe { call!(cuIpcOpenMemHandle_v2(&mut address, name, flags)) }?;
        let opened = Self { context: context.clone(), address: DeviceAddress(address), bytes, handle };
        let there = opened.bytes_there()?;
        if bytes == 0 || bytes > there {
            let reason = format!("{bytes} bytes were announced, {there} are there");
            return Err(Error::refused("memory of another process", reason));
        }
        Ok(opened)
    }

    /// Bytes from our address to the end of the allocation, by the driver's word.
    fn bytes_there(&self) -> Result<usize, Error> {
        let (mut base, mut bytes) = (0, 0);
        // SAFETY: writes two numbers; the address is mapped.
        unsafe { call!(cuMemGetAddressRange_v2(ptr::from_mut(&mut base), &mut bytes, self.address.0)) }?;
        Ok(bytes.saturating_sub((self.address.0 - base) as usize))
    }
}

impl DeviceRange for IpcMemory {
    /// Opened there as well: through the mapping of the memory's own GPU copies took a detour (`kvbm bench fan-out`).
    fn seen_by(&self, other: &Context) -> Result<Option<Arc<dyn DeviceRange>>, Error> {
        if other.device().uuid == self.context.device().uuid {
            return Ok(None);
        }
        check_way(other, &self.context)?;
        Ok(Some(Arc::new(Self::open(other, self.handle, self.bytes)?)))
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

impl Drop for IpcMemory {
    fn drop(&mut self) {
        let _ = self.context.synchronize();
        // SAFETY: opened once, closed once; nothing of ours on the GPU uses it any more.
        let _ = unsafe { call!(cuIpcCloseMemHandle(self.address.0)) };
    }
}
