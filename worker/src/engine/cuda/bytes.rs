//! Numbers as the bytes that are copied to and from a GPU.

/// Numbers without padding, for which any bytes are a value.
///
/// # Safety
/// As said.
pub(super) unsafe trait Plain: Copy {}

// SAFETY: an integer.
unsafe impl Plain for u16 {}
// SAFETY: an integer.
unsafe impl Plain for u32 {}
// SAFETY: any 32 bits are a number, or none.
unsafe impl Plain for f32 {}

pub(super) fn bytes<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: the same memory, and every byte of it is initialised.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

pub(super) fn bytes_mut<T: Plain>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: the same memory, and any bytes written to it are values.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}
