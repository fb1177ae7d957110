//! The edge to the driver's C functions: results become errors, and functions are looked up before they are relied on.

use std::ffi::{CStr, c_char};
use std::ptr;

pub(crate) use cudarc::driver::sys as cu;

use crate::Error;

/// Calls a function of the driver by name and turns its result into an error that names it. To be used within `unsafe`.
macro_rules! call {
    ($function:ident($($argument:expr),* $(,)?)) => {
        $crate::sys::check(stringify!($function), $crate::sys::cu::$function($($argument),*))
    };
}
pub(crate) use call;

/// Functions that this crate cannot do without. The bindings would panic where one is missing.
const REQUIRED: [&str; 67] = [
    "cuCtxEnablePeerAccess",
    "cuCtxGetStreamPriorityRange",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuDeviceCanAccessPeer",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetPCIBusId",
    "cuDeviceGetUuid_v2",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuInit",
    "cuIpcCloseMemHandle",
    "cuIpcGetMemHandle",
    "cuIpcOpenMemHandle_v2",
    "cuLaunchKernel",
    "cuMemAddressFree",
    "cuMemAddressReserve",
    "cuMemAlloc_v2",
    "cuMemCreate",
    "cuMemExportToShareableHandle",
    "cuMemFree_v2",
    "cuMemGetAddressRange_v2",
    "cuMemGetAllocationGranularity",
    "cuMemGetInfo_v2",
    "cuMemHostGetDevicePointer_v2",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemImportFromShareableHandle",
    "cuMemMap",
    "cuMemRelease",
    "cuMemSetAccess",
    "cuMemUnmap",
    "cuMemcpyAsync",
    "cuMemcpyDtoH_v2",
    "cuMemcpyHtoD_v2",
    "cuMemsetD8Async",
    "cuMemsetD8_v2",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuStreamBeginCapture_v2",
    "cuStreamCreateWithPriority",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamQuery",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuStreamWaitValue32_v2",
    "cuStreamWriteValue32_v2",
    "cuThreadExchangeStreamCaptureMode",
];

/// The first function of [`REQUIRED`] that the loaded driver lacks. Only to be called when the library is there.
pub(crate) fn missing_function() -> Option<&'static str> {
    REQUIRED.into_iter().find(|name| symbol::<unsafe extern "C" fn()>(name).is_none())
}

/// A function of the driver that the bindings do not have, or that older drivers do not have. `F` must be the type of a
/// function pointer. Only to be called when the library is there.
pub(crate) fn symbol<F: Copy>(name: &str) -> Option<F> {
    // SAFETY: loading the driver runs its initialisers, which every program that uses CUDA does; whoever calls the function
    // vouches for its type.
    unsafe { cu::culib().get::<F>(name.as_bytes()).ok().map(|found| *found) }
}

/// The driver's result as ours.
pub(crate) fn check(call: &'static str, result: cu::CUresult) -> Result<(), Error> {
    if result == cu::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let (mut name, mut meaning) = (ptr::null(), ptr::null());
    // SAFETY: both functions write one pointer to a constant string, or null.
    unsafe {
        let _ = cu::cuGetErrorName(result, &mut name);
        let _ = cu::cuGetErrorString(result, &mut meaning);
    }
    Err(Error::Call { call, code: result as u32, name: text(name), meaning: text(meaning) })
}

/// As [`check`], for calls whose answer "not ready" is no error.
pub(crate) fn check_ready(call: &'static str, result: cu::CUresult) -> Result<bool, Error> {
    if result == cu::CUresult::CUDA_ERROR_NOT_READY {
        return Ok(false);
    }
    check(call, result).map(|()| true)
}

/// A C string of the driver's.
fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return "unknown".into();
    }
    // SAFETY: the driver's strings are constant and end with a zero.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    use super::REQUIRED;

    /// Names of the driver's functions that a source file calls through the bindings.
    fn called(source: &str) -> impl Iterator<Item = &str> {
        source.match_indices("cu").filter_map(|(at, _)| {
            let before = &source[..at];
            if !(before.ends_with("call!(") || before.ends_with("cu::")) {
                return None;
            }
            let end = at + source[at..].find(|c: char| !c.is_alphanumeric() && c != '_')?;
            let name = &source[at..end];
            (source[end..].starts_with('(') && name[2..].starts_with(char::is_uppercase)).then_some(name)
        })
    }

    fn sources(folder: &Path, found: &mut Vec<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, found);
            } else {
                found.push(fs::read_to_string(path).unwrap());
            }
        }
    }

    #[test]
    fn every_function_that_is_called_is_asked_for_first() {
        let mut all = Vec::new();
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut all);
        let called: BTreeSet<&str> = all.iter().flat_map(|source| called(source)).collect();
        assert!(called.contains("cuMemcpyAsync") && called.contains("cuStreamQuery"), "{called:?}");
        assert_eq!(called, BTreeSet::from(REQUIRED));
    }
}
