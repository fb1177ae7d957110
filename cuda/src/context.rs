//! The primary context of a GPU, which all libraries of a process share.
//!
//! CUDA keeps a current context per thread. Everything here makes its own current before each call, so that no caller has
//! to know on which thread it is.

use std::fmt;
use std::ptr;
use std::sync::Arc;

use crate::driver;
use crate::sys::{call, cu};
use crate::{Device, Driver, Error};

/// A share in a GPU's primary context. Clones are cheap; the last one gives it back.
#[derive(Clone)]
pub struct Context(Arc<Primary>);

struct Primary {
    context: cu::CUcontext,
    handle: cu::CUdevice,
    device: Device,
}

// SAFETY: contexts may be used from any thread; the driver synchronises.
unsafe impl Send for Primary {}
// SAFETY: as above.
unsafe impl Sync for Primary {}

impl Context {
    /// Opens the GPU for this process.
    pub fn open(_driver: &Driver, device: &Device) -> Result<Self, Error> {
        let handle = driver::handle(device.ordinal as i32)?;
        let mut context = ptr::null_mut();
        // SAFETY: writes one handle, which `Primary` gives back.
        unsafe { call!(cuDevicePrimaryCtxRetain(&mut context, handle)) }?;
        let opened = Self(Arc::new(Primary { context, handle, device: device.clone() }));
        opened.bind()?;
        Ok(opened)
    }

    /// Makes it current for the calling thread. Only needed before using other libraries of CUDA.
    pub fn bind(&self) -> Result<(), Error> {
        // SAFETY: the context is alive as long as `self`.
        unsafe { call!(cuCtxSetCurrent(self.0.context)) }
    }

    /// The GPU.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// Free and total memory of the GPU, bytes.
    pub fn memory(&self) -> Result<(u64, u64), Error> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two numbers.
        unsafe { call!(cuMemGetInfo_v2(&mut free, &mut total)) }?;
        Ok((free as u64, total as u64))
    }

    /// Waits until all work on the GPU that this process has issued has ended, and tells whether any of it failed.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.bind()?;
        // SAFETY: waits for the current context.
        unsafe { call!(cuCtxSynchronize()) }
    }

    /// True if this GPU can reach the other's memory directly.
    pub fn can_reach(&self, other: &Context) -> Result<bool, Error> {
        let mut can = 0;
        // SAFETY: writes one number.
        unsafe { call!(cuDeviceCanAccessPeer(&mut can, self.0.handle, other.0.handle)) }?;
        Ok(can != 0)
    }

    /// Lets this GPU reach memory that the other allocated with [`crate::DeviceMemory`]. Once is enough.
    pub fn reach(&self, other: &Context) -> Result<(), Error> {
        self.bind()?;
        // SAFETY: both contexts are alive.
        match unsafe { call!(cuCtxEnablePeerAccess(other.0.context, 0)) } {
            // Already so.
            Err(Error::Call { code: 704, .. }) => Ok(()),
            other => other,
        }
    }

    pub(crate) fn handle(&self) -> cu::CUdevice {
        self.0.handle
    }
}

impl Drop for Primary {
    fn drop(&mut self) {
        // SAFETY: retained once by `open`; everything that uses the context holds a clone of the `Arc`.
        let _ = unsafe { call!(cuDevicePrimaryCtxRelease_v2(self.handle)) };
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Context({})", self.0.device.uuid)
    }
}
