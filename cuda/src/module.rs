//! Kernels: loaded from PTX or machine code, launched with arguments.

use std::ffi::{CString, c_void};
use std::fmt;
use std::ptr;
use std::sync::Arc;

use crate::sys::{call, cu};
use crate::{Context, DeviceAddress, Error, Stream};

mod by_value;

/// Most arguments that a kernel may take.
const ARGUMENTS_MAX: usize = 32;

/// Loaded code.
#[derive(Clone)]
pub struct Module(Arc<Loaded>);

struct Loaded {
    context: Context,
    raw: cu::CUmodule,
}

// SAFETY: modules may be used from any thread; the driver synchronises.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

impl Module {
    /// Loads code for the GPU: machine code (a cubin), or PTX, which the driver compiles.
    pub fn load(context: &Context, image: &[u8]) -> Result<Self, Error> {
        context.bind()?;
        // PTX is text that must end with a zero; to machine code a zero behind it does no harm.
        let mut image = image.to_vec();
        image.push(0);
        let mut raw = ptr::null_mut();
        // SAFETY: writes one handle, which `Loaded` unloads. The image is complete: machine code says how long it is, text
        // ends with a zero.
        unsafe { call!(cuModuleLoadData(&mut raw, image.as_ptr().cast())) }?;
        Ok(Self(Arc::new(Loaded { context: context.clone(), raw })))
    }

    /// One of its kernels.
    pub fn function(&self, name: &str) -> Result<Function, Error> {
        self.0.context.bind()?;
        let c_name = CString::new(name).map_err(|_| Error::refused("name of a kernel", name))?;
        let mut raw = ptr::null_mut();
        // SAFETY: writes one handle, which lives as long as the module.
        unsafe { call!(cuModuleGetFunction(&mut raw, self.0.raw, c_name.as_ptr())) }.map_err(|error| {
            match error {
                Error::Call { code: 500, .. } => Error::missing(
                    format!("kernel {name}"),
                    "the module does not have it",
                    "rebuild the kernels",
                ),
                other => other,
            }
        })?;
        Ok(Function { module: self.clone(), raw })
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: loaded once; functions hold a share of the module.
        let _ = unsafe { call!(cuModuleUnload(self.raw)) };
    }
}

impl fmt::Debug for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Module of {:?}", self.0.context)
    }
}

/// A kernel.
#[derive(Debug, Clone)]
pub struct Function {
    module: Module,
    raw: cu::CUfunction,
}

// SAFETY: as for modules.
unsafe impl Send for Function {}
// SAFETY: as for modules.
unsafe impl Sync for Function {}

/// How many threads run a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Blocks of threads, in three dimensions.
    pub grid: [u32; 3],
    /// Threads of each, in three dimensions.
    pub block: [u32; 3],
    /// Memory that the threads of a block share, beside what the kernel declares, bytes.
    pub shared_bytes: u32,
}

/// Arguments of a kernel, in its order. They are copied when it is launched.
#[derive(Debug, Clone, Default)]
pub struct Arguments {
    values: [u64; ARGUMENTS_MAX],
    count: usize,
}

impl Arguments {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A pointer.
    pub fn address(self, value: DeviceAddress) -> Self {
        self.u64(value.0)
    }

    /// An unsigned 64-bit number.
    pub fn u64(mut self, value: u64) -> Self {
        assert!(self.count < ARGUMENTS_MAX, "a kernel takes at most {ARGUMENTS_MAX} arguments");
        self.values[self.count] = value;
        self.count += 1;
        self
    }

    /// An unsigned 32-bit number. The driver reads as many bytes of each as the kernel declares.
    pub fn u32(self, value: u32) -> Self {
        self.u64(u64::from(value))
    }

    /// A signed 32-bit number.
    pub fn i32(self, value: i32) -> Self {
        self.u32(value.cast_unsigned())
    }

    /// A 32-bit floating point number.
    pub fn f32(self, value: f32) -> Self {
        self.u32(value.to_bits())
    }
}

impl Function {
    /// Lets blocks have more shared memory than the 48 KiB that every GPU grants.
    pub fn allow_shared_bytes(&self, bytes: u32) -> Result<(), Error> {
        self.module.0.context.bind()?;
        let which = cu::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: our own kernel; the driver refuses what the GPU does not have.
        unsafe { call!(cuFuncSetAttribute(self.raw, which, bytes as i32)) }
    }

    /// Issues the kernel.
    ///
    /// # Safety
    /// The kernel takes exactly these arguments, of these sizes, and everything that it reaches through them is mapped until
    /// it has ended, with no reference of Rust's into it.
    pub unsafe fn launch(&self, stream: &Stream, launch: Launch, arguments: &Arguments) -> Result<(), Error> {
        stream.context().bind()?;
        let mut pointers = [ptr::null_mut::<c_void>(); ARGUMENTS_MAX];
        for (pointer, value) in pointers.iter_mut().zip(&arguments.values[..arguments.count]) {
            *pointer = ptr::from_ref(value).cast_mut().cast();
        }
        let (grid, block) = (launch.grid, launch.block);
        // SAFETY: the caller's promise; the driver copies the arguments before it returns.
        unsafe {
            call!(cuLaunchKernel(
                self.raw,
                grid[0],
                grid[1],
                grid[2],
                block[0],
                block[1],
                block[2],
                launch.shared_bytes,
                stream.raw(),
                pointers.as_mut_ptr(),
                ptr::null_mut(),
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_little_endian_at_the_start_of_their_word() {
        let arguments =
            Arguments::new().address(DeviceAddress(7 << 40)).i32(-2).f32(1.5).u32(9).u64(u64::MAX);
        assert_eq!(arguments.count, 5);
        assert_eq!(arguments.values[0], 7 << 40);
        assert_eq!(arguments.values[1].to_le_bytes()[..4], (-2i32).to_le_bytes());
        assert_eq!(arguments.values[2].to_le_bytes()[..4], 1.5f32.to_le_bytes());
        assert_eq!(arguments.values[4], u64::MAX);
    }

    #[test]
    #[should_panic(expected = "at most 32 arguments")]
    fn too_many_arguments_are_a_bug() {
        let _ = (0..33).fold(Arguments::new(), |arguments, i| arguments.u32(i));
    }
}
