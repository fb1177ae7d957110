//! The disk cache's files as damage meets them: behind the daemon's back.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use kvbm_hash::SequenceHash;

/// Blocks begin at multiples of this.
const PAGE: usize = 4096;
/// An entry of a segment's table, and how a stored one begins: docs/disk-format.md.
const ENTRY: usize = 128;
const STORED: &[u8] = b"STOR";
/// Where an entry has its key.
const KEY_AT: usize = 8;
/// Bytes of the file's header before their check.
const HEADER_FIELDS: usize = 504;

/// The file in a directory of the disk tier.
pub fn disk_file(directory: &Path) -> PathBuf {
    directory.join("kvbm-disk-cache")
}

/// Changes one byte of each copy of a block that begins with `bytes`; returns how many copies there were.
pub fn flip_payload(directories: &[PathBuf], bytes: &[u8]) -> usize {
    let beginning = &bytes[..16];
    flip(directories, PAGE, 100, |at| at.starts_with(beginning))
}

/// Changes one byte of the entry of a block; returns how many entries there were.
pub fn flip_entry(directories: &[PathBuf], key: SequenceHash) -> usize {
    flip(directories, ENTRY, 44, |at| at.starts_with(STORED) && at[KEY_AT..].starts_with(&key.0))
}

fn flip(directories: &[PathBuf], step: usize, offset: usize, is_it: impl Fn(&[u8]) -> bool) -> usize {
    let mut flipped = 0;
    for directory in directories {
        let path = disk_file(directory);
        let bytes = std::fs::read(&path).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        for start in (0..bytes.len()).step_by(step).filter(|start| is_it(&bytes[*start..])) {
            let at = start + offset;
            file.write_all_at(&[bytes[at] ^ 1], at as u64).unwrap();
            flipped += 1;
        }
    }
    flipped
}

/// Makes the first file one of another version, all else being right.
pub fn set_version(directory: &Path, version: u32) {
    let file = File::options().read(true).write(true).open(disk_file(directory)).unwrap();
    let mut fields = [0; HEADER_FIELDS];
    file.read_exact_at(&mut fields, 0).unwrap();
    fields[8..12].copy_from_slice(&version.to_le_bytes());
    file.write_all_at(&fields, 0).unwrap();
    file.write_all_at(&check(&fields).to_le_bytes(), HEADER_FIELDS as u64).unwrap();
}

/// Changes one byte of the file's header.
pub fn flip_header(directory: &Path) {
    let file = File::options().read(true).write(true).open(disk_file(directory)).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 40).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 40).unwrap();
}

/// CRC-64/NVME, as slow as it is short.
fn check(bytes: &[u8]) -> u64 {
    const POLYNOMIAL: u64 = 0x9A6C_9329_AC4B_C9B5;
    let step = |crc: u64, _| if crc & 1 == 1 { (crc >> 1) ^ POLYNOMIAL } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u64::from(*byte), step))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_check_is_the_documented_one() {
        assert_eq!(super::check(b"123456789"), 0xAE8B_1486_0A79_9888);
    }
}
