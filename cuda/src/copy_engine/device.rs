//! What the executor needs of a device: the seam at which tests put memory of the host in place of a GPU.

use super::CopyMemory;
use crate::{Error, RawCopy};

/// One direction of a device: what is issued runs beside the other direction's. Used by one thread.
pub(super) trait CopyDevice: 'static {
    /// A place in what was issued.
    type Mark;

    /// True if copies may read and write there.
    fn reaches(memory: &CopyMemory) -> bool
    where
        Self: Sized;

    /// Issues copies. They may run in any order among each other. After an error some of them
    /// may be under way.
    ///
    /// # Safety
    /// Both ranges of each copy lie in memory that the device reaches, and stay mapped until a mark set afterwards is reached.
    unsafe fn issue(&mut self, copies: &[RawCopy]) -> Result<(), Error>;

    /// Marks what was issued so far.
    fn mark(&mut self) -> Result<Self::Mark, Error>;

    /// True once everything before the mark has ended.
    fn is_reached(&mut self, mark: &Self::Mark) -> Result<bool, Error>;

    /// The mark is not needed any more.
    fn recycle(&mut self, mark: Self::Mark);

    /// Waits until nothing that was issued runs any more, or the device has broken down.
    fn finish(&mut self);
}
