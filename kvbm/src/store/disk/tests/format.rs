//! The bytes on disk are those of docs/disk-format.md.

use super::super::geometry::Geometry;
use super::super::header::{FileHeader, SetState};
use crate::ledger::SegmentId;
use crate::store::table::{Binding, Decoded, Entry, PAGE_BYTES, payload_check};

const DOCUMENT: &str = include_str!("../../../../../docs/disk-format.md");

/// The bytes of the example with this name: lines of an offset and up to 16 bytes; what is not listed is zero.
fn example(name: &str, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let start = DOCUMENT.find(&format!("Example: {name} (")).expect("the document has it");
    let block = DOCUMENT[start..].split("```").nth(1).expect("in a block");
    for line in block.lines().filter(|line| !line.trim().is_empty() && *line != "text") {
        let (offset, listed) = line.split_once(": ").expect("an offset");
        let offset: usize = offset.trim().parse().expect("a decimal offset");
        for (at, byte) in listed.split_whitespace().enumerate() {
            bytes[offset + at] = u8::from_str_radix(byte, 16).expect("hexadecimal");
        }
    }
    bytes
}

/// As it would stand in the document.
fn listing(bytes: &[u8]) -> String {
    let line = |(at, part): (usize, &[u8])| {
        let listed: Vec<String> = part.iter().map(|byte| format!("{byte:02x}")).collect();
        (part.iter().any(|byte| *byte != 0)).then(|| format!("{:4}: {}\n", at * 16, listed.join(" ")))
    };
    bytes.chunks(16).enumerate().filter_map(line).collect()
}

fn assert_documented(name: &str, bytes: &[u8]) {
    let documented = example(name, bytes.len());
    assert!(documented == bytes, "{name} is now\n{}", listing(bytes));
}

#[test]
fn a_file_header_is_as_documented() {
    let header = FileHeader {
        state: SetState::Open,
        set: *b"\x01\x23\x45\x67\x89\xab\xcd\xef\x10\x32\x54\x76\x98\xba\xdc\xfe",
        file: 1,
        geometry: Geometry { files: 2, extent_bytes: 64 << 20 },
        segments: 63,
        created_at_s: 1_700_000_000,
    };
    assert_documented("file header", &header.encode());
    let page: [u8; PAGE_BYTES] = example("file header", PAGE_BYTES).try_into().unwrap();
    assert_eq!(FileHeader::decode(&page), Ok(header));
}

#[test]
fn a_segment_header_is_as_documented() {
    let binding = Binding { domain: 1000, stride: 65_536, slots: 1021, seal: 0x1122_3344_5566_7788 };
    assert_eq!(Geometry { files: 2, extent_bytes: 64 << 20 }.slots_in_extent(65_536), 1021);
    assert_documented("segment header", &binding.encode());
    let page: [u8; PAGE_BYTES] = example("segment header", PAGE_BYTES).try_into().unwrap();
    assert_eq!(Binding::decode(&page), Some(binding));
}

#[test]
fn an_entry_and_its_checks_are_as_documented() {
    let memory = kvbm_shm::SharedMemory::create("test", 4096).unwrap();
    memory.write(0, b"123456789");
    let (namespace, key) = ([0xaa; 32], [0xbb; 16]);
    let generation = 0x0102_0304_0506_0708;
    let entry = Entry {
        namespace,
        key,
        parent: Some([0xcc; 16]),
        generation,
        payload_check: payload_check(&namespace, &key, generation, &memory, 0, 9),
        payload_bytes: 9,
        priority: 50,
        stored_at_s: 1_700_000_000,
        expires_at_s: Some(1_700_003_600),
    };
    let (seal, index) = (0x1122_3344_5566_7788, 5);
    assert_documented("entry", &entry.encode(seal, index));
    let bytes: [u8; 128] = example("entry", 128).try_into().unwrap();
    assert_eq!(Decoded::of(&bytes, seal, index), Decoded::Stored(entry));
}

#[test]
fn places_are_as_documented() {
    let geometry = Geometry { files: 2, extent_bytes: 64 << 20 };
    assert_eq!(geometry.offset(SegmentId(0)), 1 << 20);
    assert_eq!(geometry.offset(SegmentId(3)), (1 << 20) + 3 * (64 << 20));
    assert_eq!(geometry.split(7), (1, 3));
    // 1021 slots, described by 32 pages behind the header page.
    assert_eq!(geometry.slot_offset(SegmentId(0), 3, 65_536), (1 << 20) + 33 * 4096 + 3 * 65_536);
}
