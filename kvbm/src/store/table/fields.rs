//! Little-endian fields at fixed offsets, and pages whose first sector carries a check.

use crc_fast::crc64_nvme;

/// Bytes of a page: what O_DIRECT writes at once.
pub const PAGE_BYTES: usize = 4096;
/// Where a header page keeps the check of all bytes before it.
pub const CHECK_AT: usize = 504;
/// A header page's fields and their check lie in one sector, so that a cut of power leaves the old or the new ones.
pub const CHECKED_PAGE_BYTES: usize = 512;

/// Writes a field.
pub fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

/// Reads a field.
pub fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("the range has N bytes")
}

/// Adds the check to a header page.
pub fn seal_page(page: &mut [u8; PAGE_BYTES]) {
    let check = crc64_nvme(&page[..CHECK_AT]);
    put(page, CHECK_AT, &check.to_le_bytes());
}

/// Whether a header page is as [`seal_page`] left it.
pub fn checked(page: &[u8; PAGE_BYTES]) -> bool {
    u64::from_le_bytes(take(page, CHECK_AT)) == crc64_nvme(&page[..CHECK_AT])
        && page[CHECKED_PAGE_BYTES..].iter().all(|byte| *byte == 0)
}
