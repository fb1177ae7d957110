use std::sync::Arc;
use std::thread;

use kvbm_shm::SharedMemory;
use proptest::prelude::*;

use super::*;

fn any_entry() -> impl Strategy<Value = Entry> {
    let identity = (any::<[u8; 32]>(), any::<[u8; 16]>(), any::<Option<[u8; 16]>>(), any::<u64>());
    let rest = (any::<u64>(), any::<u32>(), any::<u8>(), any::<u64>(), any::<Option<u64>>());
    (identity, rest).prop_map(|((namespace, key, parent, generation), rest)| {
        let (payload_check, payload_bytes, priority, stored_at_s, expires_at_s) = rest;
        Entry {
            namespace,
            key,
            parent,
            generation,
            payload_check,
            payload_bytes,
            priority,
            stored_at_s,
            expires_at_s,
        }
    })
}

fn any_binding() -> impl Strategy<Value = Binding> {
    (any::<u32>(), any::<usize>(), any::<u32>(), any::<u64>())
        .prop_map(|(domain, stride, slots, seal)| Binding { domain, stride, slots, seal })
}

fn flip(bytes: &mut [u8], bit: usize) {
    bytes[bit / 8] ^= 1 << (bit % 8);
}

proptest! {
    #[test]
    fn an_entry_is_what_was_encoded(entry in any_entry(), seal: u64, index: u32) {
        let bytes = entry.encode(seal, index);
        prop_assert_eq!(Decoded::of(&bytes, seal, index), Decoded::Stored(entry));
    }

    #[test]
    fn no_flipped_bits_make_another_entry(entry in any_entry(), seal: u64, index: u32,
                                          bits in prop::collection::btree_set(0usize..1024, 1..4)) {
        let mut bytes = entry.encode(seal, index);
        bits.iter().for_each(|bit| flip(&mut bytes, *bit));
        prop_assert_eq!(Decoded::of(&bytes, seal, index), Decoded::Damaged);
    }

    #[test]
    fn an_entry_counts_only_in_its_slot_and_binding(entry in any_entry(), seal: u64, other: u64, index: u32, elsewhere: u32) {
        prop_assume!(seal != other && index != elsewhere);
        let bytes = entry.encode(seal, index);
        prop_assert_eq!(Decoded::of(&bytes, other, index), Decoded::Free);
        prop_assert_eq!(Decoded::of(&bytes, seal, elsewhere), Decoded::Damaged);
    }

    #[test]
    fn torn_entries_are_damaged(old in any_entry(), new in any_entry(), seal: u64, index: u32, at in 1usize..128) {
        let (old_bytes, new_bytes) = (old.encode(seal, index), new.encode(seal, index));
        let mut torn = new_bytes;
        torn[at..].copy_from_slice(&old_bytes[at..]);
        prop_assume!(torn != old_bytes && torn != new_bytes);
        prop_assert_eq!(Decoded::of(&torn, seal, index), Decoded::Damaged);
    }

    #[test]
    fn a_binding_is_what_was_encoded(binding in any_binding()) {
        prop_assert_eq!(Binding::decode(&binding.encode()), Some(binding));
    }

    #[test]
    fn no_flipped_bits_make_another_binding(binding in any_binding(),
                                            bits in prop::collection::btree_set(0usize..8 * PAGE_BYTES, 1..4)) {
        let mut page = binding.encode();
        bits.iter().for_each(|bit| flip(&mut page, *bit));
        prop_assert_eq!(Binding::decode(&page), None);
    }

    #[test]
    fn no_bytes_are_trusted_that_are_not_ours(bytes in prop::collection::vec(any::<u8>(), 3 * PAGE_BYTES)) {
        let memory = Arc::new(SharedMemory::create("test", bytes.len()).unwrap());
        memory.write(0, &bytes);
        let table = SegmentTable::from_memory(memory);
        prop_assert_eq!(table.binding(), None);
        for index in 0..table.slots_max() {
            prop_assert!(!matches!(table.get(index), Decoded::Stored(_)));
        }
    }
}

#[test]
fn every_single_flipped_bit_is_noticed() {
    let bytes = entry(1).encode(7, 3);
    for bit in 0..1024 {
        let mut flipped = bytes;
        flip(&mut flipped, bit);
        assert_eq!(Decoded::of(&flipped, 7, 3), Decoded::Damaged, "bit {bit}");
    }
    let page = BINDING.encode();
    for bit in 0..8 * PAGE_BYTES {
        let mut flipped = page;
        flip(&mut flipped, bit);
        assert_eq!(Binding::decode(&flipped), None, "bit {bit}");
    }
}

const BINDING: Binding = Binding { domain: 1000, stride: 65_536, slots: 60, seal: 0x1122_3344_5566_7788 };

fn entry(n: u8) -> Entry {
    Entry {
        namespace: [n; 32],
        key: [n.wrapping_add(1); 16],
        parent: Some([n.wrapping_add(2); 16]),
        generation: u64::from(n),
        payload_check: u64::from(n) << 32,
        payload_bytes: u32::from(n) << 12,
        priority: n,
        stored_at_s: 1_700_000_000,
        expires_at_s: None,
    }
}

#[test]
fn a_table_keeps_what_was_set_through_another_mapping() {
    let table = SegmentTable::create(60).unwrap();
    assert_eq!(table.binding(), None);
    assert_eq!((table.slots_max(), table.memory().bytes()), (64, 3 * PAGE_BYTES));
    table.bind(BINDING);
    (0..60).for_each(|index| table.set(index, &entry(index as u8)));
    assert!(table.clear(17));
    assert!(!table.clear(17));
    let fd = table.memory().fd().try_clone_to_owned().unwrap();
    let seen = SegmentTable::from_memory(Arc::new(SharedMemory::from_fd(fd).unwrap()));
    assert_eq!(seen.binding(), Some(BINDING));
    for index in 0..60 {
        let expected = if index == 17 { Decoded::Free } else { Decoded::Stored(entry(index as u8)) };
        assert_eq!(seen.get(index), expected);
    }
}

#[test]
fn binding_anew_forgets_every_entry() {
    let table = SegmentTable::create(60).unwrap();
    table.bind(BINDING);
    (0..60).for_each(|index| table.set(index, &entry(index as u8)));
    table.bind(Binding { seal: 1, ..BINDING });
    assert!((0..60).all(|index| table.get(index) == Decoded::Free));
}

#[test]
fn a_binding_with_more_slots_than_memory_is_not_believed() {
    let table = SegmentTable::create(64).unwrap();
    table.memory().write(0, &Binding { slots: 65, ..BINDING }.encode());
    assert_eq!(table.binding(), None);
}

#[test]
fn a_reader_beside_the_writer_never_sees_an_entry_that_was_not_set() {
    let table = SegmentTable::create(60).unwrap();
    table.bind(BINDING);
    let fd = table.memory().fd().try_clone_to_owned().unwrap();
    let seen = SegmentTable::from_memory(Arc::new(SharedMemory::from_fd(fd).unwrap()));
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for n in 0..20_000_u32 {
                if n.is_multiple_of(7) {
                    table.clear(0);
                }
                table.set(0, &entry(n as u8));
            }
        });
        while !writer.is_finished() {
            if let Decoded::Stored(found) = seen.get(0) {
                assert_eq!(found, entry(found.priority));
            }
        }
    });
    assert!(matches!(seen.get(0), Decoded::Stored(_)));
}

#[test]
fn a_payload_check_is_of_one_block_in_one_generation() {
    let memory = SharedMemory::create("test", 1 << 20).unwrap();
    memory.write(100, b"bytes of a block");
    let check = |namespace, key, generation, offset, bytes| {
        payload_check(&[namespace; 32], &[key; 16], generation, &memory, offset, bytes)
    };
    let right = check(1, 2, 3, 100, 16);
    for other in [check(9, 2, 3, 100, 16), check(1, 9, 3, 100, 16), check(1, 2, 9, 100, 16)] {
        assert_ne!(other, right);
    }
    assert_ne!(check(1, 2, 3, 101, 16), right);
    assert_ne!(check(1, 2, 3, 100, 17), right, "a zero more is another length");
    let mut all = [&[1_u8; 32][..], &[2; 16], &3_u64.to_le_bytes(), &16_u64.to_le_bytes()].concat();
    all.extend_from_slice(b"bytes of a block");
    assert_eq!(right, crc_fast::crc64_nvme(&all));
}
