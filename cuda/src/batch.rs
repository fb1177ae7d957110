//! Many copies with one call. A call per block costs more time than the copy of a small block takes.

use std::fmt;

use crate::sys::{self, check, cu};
use crate::{DeviceAddress, Error, Stream};

/// One piece of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawCopy {
    /// Where to read.
    pub from: DeviceAddress,
    /// Where to write.
    pub to: DeviceAddress,
    /// How much.
    pub bytes: usize,
}

/// How the driver takes a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchForm {
    /// CUDA 13: `cuMemcpyBatchAsync_v2`.
    V2,
    /// CUDA 12.8: `cuMemcpyBatchAsync`, which also tells which copy failed.
    V1,
    /// Older: one call per copy.
    Loop,
}

/// What CUDA 12.8 calls `cuMemcpyBatchAsync`; the bindings only have what 13 made of it.
type BatchV1 = unsafe extern "C" fn(
    dsts: *mut cu::CUdeviceptr,
    srcs: *mut cu::CUdeviceptr,
    sizes: *mut usize,
    count: usize,
    attrs: *mut cu::CUmemcpyAttributes,
    attrs_idxs: *mut usize,
    num_attrs: usize,
    fail_idx: *mut usize,
    stream: cu::CUstream,
) -> cu::CUresult;

/// What CUDA 13 calls it.
type BatchV2 = unsafe extern "C" fn(
    dsts: *mut cu::CUdeviceptr,
    srcs: *mut cu::CUdeviceptr,
    sizes: *mut usize,
    count: usize,
    attrs: *mut cu::CUmemcpyAttributes,
    attrs_idxs: *mut usize,
    num_attrs: usize,
    stream: cu::CUstream,
) -> cu::CUresult;

#[derive(Clone, Copy)]
enum Call {
    V2(BatchV2),
    V1(BatchV1),
    Loop,
}

/// Issues batches. It keeps its arrays, so that batches allocate nothing once the largest was seen.
pub struct BatchCopier {
    call: Call,
    to: Vec<u64>,
    from: Vec<u64>,
    bytes: Vec<usize>,
}

impl BatchCopier {
    /// The best form that the driver has.
    pub fn new(driver: &crate::Driver) -> Self {
        let forms = [BatchForm::V2, BatchForm::V1];
        let best = forms.into_iter().find_map(|form| Self::with_form(driver, form));
        best.unwrap_or_else(|| Self::over(Call::Loop))
    }

    /// A form of the caller's choice, if the driver has it.
    pub fn with_form(_driver: &crate::Driver, form: BatchForm) -> Option<Self> {
        let call = match form {
            BatchForm::V2 => Call::V2(sys::symbol("cuMemcpyBatchAsync_v2")?),
            BatchForm::V1 => Call::V1(sys::symbol("cuMemcpyBatchAsync")?),
            BatchForm::Loop => Call::Loop,
        };
        Some(Self::over(call))
    }

    fn over(call: Call) -> Self {
        Self { call, to: Vec::new(), from: Vec::new(), bytes: Vec::new() }
    }

    /// What is in use.
    pub fn form(&self) -> BatchForm {
        match self.call {
            Call::V2(_) => BatchForm::V2,
            Call::V1(_) => BatchForm::V1,
            Call::Loop => BatchForm::Loop,
        }
    }

    /// Issues all copies, in the order of the stream with regard to everything else, in any order among each other. On an
    /// error some of them may have been issued.
    ///
    /// # Safety
    /// Both ranges of each copy are mapped, on a GPU or as registered host memory, each within one allocation or chunk, and
    /// stay so until the copies have ended. Nothing in Rust holds a reference into any of them meanwhile.
    pub unsafe fn copy(&mut self, stream: &Stream, copies: &[RawCopy]) -> Result<(), Error> {
        if copies.is_empty() {
            return Ok(());
        }
        stream.context().bind()?;
        if let Call::Loop = self.call {
            // SAFETY: the caller's promise.
            return copies.iter().try_for_each(|copy| unsafe { stream.copy(copy.to, copy.from, copy.bytes) });
        }
        // SAFETY: the caller's promise.
        unsafe { self.issue(stream.raw(), copies) }
    }

    /// One call for all.
    ///
    /// # Safety
    /// As for [`BatchCopier::copy`], and the stream's context is current.
    unsafe fn issue(&mut self, stream: cu::CUstream, copies: &[RawCopy]) -> Result<(), Error> {
        self.to.clear();
        self.to.extend(copies.iter().map(|copy| copy.to.0));
        self.from.clear();
        self.from.extend(copies.iter().map(|copy| copy.from.0));
        self.bytes.clear();
        self.bytes.extend(copies.iter().map(|copy| copy.bytes));
        let (count, mut attributes, mut first) = (copies.len(), in_stream_order(), 0);
        let (to, from, bytes) = (self.to.as_mut_ptr(), self.from.as_mut_ptr(), self.bytes.as_mut_ptr());
        match self.call {
            Call::V2(call) => {
                // SAFETY: arrays of `count` items, one set of attributes from copy 0 on; the ranges are the caller's promise.
                let result = unsafe { call(to, from, bytes, count, &mut attributes, &mut first, 1, stream) };
                check("cuMemcpyBatchAsync_v2", result)
            }
            Call::V1(call) => {
                let mut failed = usize::MAX;
                // SAFETY: as above.
                let result = unsafe {
                    call(to, from, bytes, count, &mut attributes, &mut first, 1, &mut failed, stream)
                };
                check("cuMemcpyBatchAsync", result)
            }
            Call::Loop => unreachable!("a loop is no single call"),
        }
    }
}

/// Sources are read when the stream gets there, and where things are is for the driver to find out.
fn in_stream_order() -> cu::CUmemcpyAttributes {
    let anywhere = cu::CUmemLocation { type_: cu::CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID, id: 0 };
    cu::CUmemcpyAttributes {
        srcAccessOrder: cu::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
        srcLocHint: anywhere,
        dstLocHint: anywhere,
        flags: 0,
    }
}

impl fmt::Debug for BatchCopier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BatchCopier by {:?}", self.form())
    }
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::*;

    /// Both forms of the call take the same attributes, which the headers of CUDA 12.8 and 13.0 lay out like this.
    #[test]
    fn attributes_have_the_layout_of_the_c_headers() {
        assert_eq!((size_of::<cu::CUmemLocation>(), size_of::<cu::CUmemcpyAttributes>()), (8, 24));
        assert_eq!(offset_of!(cu::CUmemcpyAttributes, srcAccessOrder), 0);
        assert_eq!(offset_of!(cu::CUmemcpyAttributes, srcLocHint), 4);
        assert_eq!(offset_of!(cu::CUmemcpyAttributes, dstLocHint), 12);
        assert_eq!(offset_of!(cu::CUmemcpyAttributes, flags), 20);
    }

    /// The properties of exportable memory, likewise.
    #[test]
    fn allocation_properties_have_the_layout_of_the_c_headers() {
        assert_eq!(size_of::<cu::CUmemAllocationProp>(), 32);
        assert_eq!(offset_of!(cu::CUmemAllocationProp, requestedHandleTypes), 4);
        assert_eq!(offset_of!(cu::CUmemAllocationProp, location), 8);
        assert_eq!(offset_of!(cu::CUmemAllocationProp, win32HandleMetaData), 16);
        assert_eq!(offset_of!(cu::CUmemAllocationProp, allocFlags), 24);
    }

    thread_local! {
        static SEEN: std::cell::RefCell<Vec<(u64, u64, usize)>> = const { std::cell::RefCell::new(Vec::new()) };
    }

    /// # Safety
    /// Arrays of `count` items.
    unsafe fn remember(dsts: *mut u64, srcs: *mut u64, sizes: *mut usize, count: usize) {
        for i in 0..count {
            // SAFETY: the caller's promise.
            let copy = unsafe { (*dsts.add(i), *srcs.add(i), *sizes.add(i)) };
            SEEN.with_borrow_mut(|seen| seen.push(copy));
        }
    }

    unsafe extern "C" fn v1(
        dsts: *mut u64,
        srcs: *mut u64,
        sizes: *mut usize,
        count: usize,
        _attrs: *mut cu::CUmemcpyAttributes,
        _idxs: *mut usize,
        attributes: usize,
        failed: *mut usize,
        _stream: cu::CUstream,
    ) -> cu::CUresult {
        // SAFETY: called with the arrays of a batch, and a place for the failed copy.
        unsafe {
            assert_eq!((*failed, attributes), (usize::MAX, 1));
            remember(dsts, srcs, sizes, count);
        }
        cu::CUresult::CUDA_SUCCESS
    }

    unsafe extern "C" fn v2(
        dsts: *mut u64,
        srcs: *mut u64,
        sizes: *mut usize,
        count: usize,
        _attrs: *mut cu::CUmemcpyAttributes,
        _idxs: *mut usize,
        attributes: usize,
        _stream: cu::CUstream,
    ) -> cu::CUresult {
        assert_eq!(attributes, 1);
        // SAFETY: called with the arrays of a batch.
        unsafe { remember(dsts, srcs, sizes, count) };
        cu::CUresult::CUDA_SUCCESS
    }

    #[test]
    fn each_form_passes_the_same_copies() {
        let copies = [(1, 2, 3), (4, 5, 6)].map(|(to, from, bytes)| RawCopy {
            to: DeviceAddress(to),
            from: DeviceAddress(from),
            bytes,
        });
        for call in [Call::V1(v1), Call::V2(v2)] {
            let mut copier = BatchCopier::over(call);
            // Twice: nothing of the batch before is left.
            for _ in 0..2 {
                SEEN.with_borrow_mut(Vec::clear);
                // SAFETY: the stand-ins above copy nothing.
                unsafe { copier.issue(std::ptr::null_mut(), &copies) }.unwrap();
                assert_eq!(SEEN.with_borrow(Vec::clone), [(1, 2, 3), (4, 5, 6)]);
            }
        }
    }
}
