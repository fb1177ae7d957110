//! What a segment is bound to, as a header page.

use super::fields::{PAGE_BYTES, checked, put, seal_page, take};

/// First bytes of the page.
const MAGIC: [u8; 8] = *b"KVBMTABL";
/// Version of the page and of the entries behind it.
const VERSION: u32 = 1;

/// What a table's slots are, until the segment is bound anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Binding {
    /// User id of the trust domain.
    pub domain: u32,
    /// Bytes from one slot to the next.
    pub stride: usize,
    /// Slots that the table describes.
    pub slots: u32,
    /// Random, different for each binding: entries of earlier ones do not count.
    pub seal: u64,
}

impl Binding {
    /// Where the seal is in the page.
    pub(super) const SEAL_AT: usize = 32;

    /// The header page.
    pub fn encode(&self) -> [u8; PAGE_BYTES] {
        let mut page = [0; PAGE_BYTES];
        put(&mut page, 0, &MAGIC);
        put(&mut page, 8, &VERSION.to_le_bytes());
        put(&mut page, 12, &self.domain.to_le_bytes());
        put(&mut page, 16, &(self.stride as u64).to_le_bytes());
        put(&mut page, 24, &self.slots.to_le_bytes());
        put(&mut page, Self::SEAL_AT, &self.seal.to_le_bytes());
        seal_page(&mut page);
        page
    }

    /// `None`: not bound, damaged, or of a version that is not known here.
    pub fn decode(page: &[u8; PAGE_BYTES]) -> Option<Self> {
        let ours = take(page, 0) == MAGIC && checked(page) && u32::from_le_bytes(take(page, 8)) == VERSION;
        let stride = usize::try_from(u64::from_le_bytes(take(page, 16))).ok()?;
        let seal = u64::from_le_bytes(take(page, Self::SEAL_AT));
        let slots = u32::from_le_bytes(take(page, 24));
        ours.then_some(Self { domain: u32::from_le_bytes(take(page, 12)), stride, slots, seal })
    }
}
