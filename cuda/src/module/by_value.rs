//! Kernels that take one structure, by value.

use std::ptr;

use crate::sys::call;
use crate::{Error, Function, Launch, Stream};

impl Function {
    /// Issues a kernel whose only argument is a structure. It is copied before this returns.
    ///
    /// # Safety
    /// As for [`Function::launch`]; `P` has the layout of the kernel's structure.
    pub unsafe fn launch_by_value<P: Copy>(
        &self,
        stream: &Stream,
        launch: Launch,
        argument: &P,
    ) -> Result<(), Error> {
        stream.context().bind()?;
        let mut pointers = [ptr::from_ref(argument).cast_mut().cast()];
        let ([x, y, z], [width, height, depth]) = (launch.grid, launch.block);
        // SAFETY: the caller's promise; the driver copies the argument before it returns.
        unsafe {
            call!(cuLaunchKernel(
                self.raw,
                x,
                y,
                z,
                width,
                height,
                depth,
                launch.shared_bytes,
                stream.raw(),
                pointers.as_mut_ptr(),
                ptr::null_mut(),
            ))
        }
    }
}
