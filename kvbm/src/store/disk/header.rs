//! The first page of each file: which set it belongs to and what form it has.

use super::geometry::Geometry;
use crate::store::table::{PAGE_BYTES, checked, put, seal_page, take};

/// First bytes of the file.
const MAGIC: [u8; 8] = *b"KVBMDISK";
/// The version written here, and the only one that is read.
pub const VERSION: u32 = 1;

/// What a set of files is going through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetState {
    /// Space is being reserved for the first time: there is no block yet.
    Creating,
    /// In use, or was when its daemon ended without a word.
    Open,
    /// Its daemon flushed it and stopped.
    Closed,
}

impl SetState {
    fn number(self) -> u32 {
        match self {
            Self::Creating => 1,
            Self::Open => 2,
            Self::Closed => 3,
        }
    }
}

/// The header of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileHeader {
    /// See there.
    pub state: SetState,
    /// Random, the same in all files of a set.
    pub set: [u8; 16],
    /// Number of this file in the set, from 0.
    pub file: u32,
    /// The set's form.
    pub geometry: Geometry,
    /// Extents that may hold something: what lies behind them does not count.
    pub segments: u32,
    /// When the set was made, in seconds since 1970.
    pub created_at_s: u64,
}

/// Why a first page does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderFault {
    /// Another kind of file.
    NotOurs,
    /// Ours, but not as it was written.
    Damaged,
    /// Of this other version.
    Version(u32),
}

impl FileHeader {
    /// The page.
    pub fn encode(&self) -> [u8; PAGE_BYTES] {
        let mut page = [0; PAGE_BYTES];
        put(&mut page, 0, &MAGIC);
        put(&mut page, 8, &VERSION.to_le_bytes());
        put(&mut page, 12, &self.state.number().to_le_bytes());
        put(&mut page, 16, &self.set);
        put(&mut page, 32, &self.file.to_le_bytes());
        put(&mut page, 36, &self.geometry.files.to_le_bytes());
        put(&mut page, 40, &self.geometry.extent_bytes.to_le_bytes());
        put(&mut page, 48, &self.segments.to_le_bytes());
        put(&mut page, 56, &self.created_at_s.to_le_bytes());
        seal_page(&mut page);
        page
    }

    /// Judges a page. Magic, version and check are where they are in every version.
    pub fn decode(page: &[u8; PAGE_BYTES]) -> Result<Self, HeaderFault> {
        if take(page, 0) != MAGIC {
            return Err(HeaderFault::NotOurs);
        }
        if !checked(page) {
            return Err(HeaderFault::Damaged);
        }
        let version = u32::from_le_bytes(take(page, 8));
        if version != VERSION {
            return Err(HeaderFault::Version(version));
        }
        let number = u32::from_le_bytes(take(page, 12));
        let states = [SetState::Creating, SetState::Open, SetState::Closed];
        let state = states.into_iter().find(|state| state.number() == number).ok_or(HeaderFault::Damaged)?;
        let geometry = Geometry {
            files: u32::from_le_bytes(take(page, 36)),
            extent_bytes: u64::from_le_bytes(take(page, 40)),
        };
        let file = u32::from_le_bytes(take(page, 32));
        if !geometry.is_sound() || file >= geometry.files {
            return Err(HeaderFault::Damaged);
        }
        Ok(Self {
            state,
            set: take(page, 16),
            file,
            geometry,
            segments: u32::from_le_bytes(take(page, 48)),
            created_at_s: u64::from_le_bytes(take(page, 56)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: FileHeader = FileHeader {
        state: SetState::Open,
        set: *b"0123456789abcdef",
        file: 1,
        geometry: Geometry { files: 2, extent_bytes: 64 << 20 },
        segments: 63,
        created_at_s: 1_700_000_000,
    };

    #[test]
    fn a_header_is_what_was_encoded() {
        for state in [SetState::Creating, SetState::Open, SetState::Closed] {
            let header = FileHeader { state, ..HEADER };
            assert_eq!(FileHeader::decode(&header.encode()), Ok(header));
        }
    }

    #[test]
    fn every_single_flipped_bit_is_noticed() {
        let page = HEADER.encode();
        for bit in 0..8 * PAGE_BYTES {
            let mut flipped = page;
            flipped[bit / 8] ^= 1 << (bit % 8);
            let expected = if bit < 64 { HeaderFault::NotOurs } else { HeaderFault::Damaged };
            assert_eq!(FileHeader::decode(&flipped), Err(expected), "bit {bit}");
        }
    }

    #[test]
    fn numbers_that_make_no_sense_are_damage_though_the_check_is_right() {
        for (at, field) in [(12, 4_u32), (32, 2), (36, 0), (40, 4095), (44, u32::MAX)] {
            let mut page = HEADER.encode();
            put(&mut page, at, &field.to_le_bytes());
            seal_page(&mut page);
            assert_eq!(FileHeader::decode(&page), Err(HeaderFault::Damaged), "at {at}");
        }
    }

    #[test]
    fn other_versions_are_named() {
        for version in [0, 2, u32::MAX] {
            let mut page = HEADER.encode();
            put(&mut page, 8, &version.to_le_bytes());
            seal_page(&mut page);
            assert_eq!(FileHeader::decode(&page), Err(HeaderFault::Version(version)));
        }
    }
}
