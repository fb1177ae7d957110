//! Real files: what comes back after a restart, and what is refused.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};

use super::super::geometry::Geometry;
use super::super::header::{FileHeader, SetState};
use super::*;
use crate::store::table::{PAGE_BYTES, put, seal_page};

fn root() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn file(directory: &Path) -> File {
    File::options().read(true).write(true).open(cache_file(directory)).unwrap()
}

fn flip(directory: &Path, offset: u64) {
    let mut byte = [0];
    file(directory).read_exact_at(&mut byte, offset).unwrap();
    file(directory).write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
}

/// Refused, with words that name the file, and every byte as before.
fn refused(config: &DiskConfig, words: &str) -> DiskError {
    let bytes =
        || -> Vec<_> { config.directories.iter().map(|dir| fs::read(cache_file(dir)).ok()).collect() };
    let before = bytes();
    let error = open(config).expect_err("it is refused");
    let message = error.to_string();
    assert!(message.contains(words), "{message}");
    assert!(message.contains("kvbm-disk-cache") && message.contains("reset"), "{message}");
    let untouched = bytes().into_iter().zip(before).all(|(now, before)| match before {
        Some(before) => now == Some(before),
        None => now.is_none_or(|now| now.is_empty()),
    });
    assert!(untouched, "a refused file has been changed");
    error
}

#[test]
fn blocks_come_back_from_two_drives_after_a_restart_and_after_a_kill() {
    for direct in [false, true] {
        let root = root();
        let config = DiskConfig { direct, ..config(directories(root.path(), 2), 4) };
        let (store, recovered) = start(&config);
        assert!(recovered.segments.is_empty() && !recovered.report.unclean);
        assert_eq!(store.segment_count(), 4);
        let mut blocks = [fill(&store, 0, SMALL), fill(&store, 2, LARGE)].concat();
        let (forgotten, block) = blocks.pop().unwrap();
        store.forget(forgotten).unwrap();
        store.close().unwrap();
        drop(store);
        for directory in &config.directories {
            let metadata = fs::metadata(cache_file(directory)).unwrap();
            assert_eq!(
                (metadata.len(), metadata.permissions().mode() & 0o777),
                ((1 << 20) + 4 * EXTENT, 0o600)
            );
        }
        let (store, recovered) = start(&config);
        assert_eq!(recovered.report.entries, blocks.len());
        assert_eq!((recovered.report.damaged, recovered.report.segments), (0, 2));
        assert!(!recovered.report.unclean && recovered.report.bytes_read > 0);
        let classes: Vec<_> = recovered.segments.iter().map(|found| (found.segment.0, found.class)).collect();
        assert_eq!(classes, [(0, SMALL), (2, LARGE)]);
        for found in &recovered.segments {
            for (index, entry) in &found.entries {
                let at = DiskPlace { segment: found.segment, index: *index };
                let block = blocks.iter().find(|(place, _)| *place == at).unwrap().1;
                assert_eq!((entry.namespace, entry.key), ([block.namespace; 32], [block.key; 16]));
                assert_eq!(entry.parent, (block.key > 0).then(|| [block.key - 1; 16]));
                assert_eq!((entry.payload_bytes as usize, entry.priority), (block.bytes, 50));
            }
        }
        assert_all_there(&store, &blocks);
        assert_eq!(block.read(&store, forgotten), Err(ReadFailure::Absent));
        // Killed: neither flushed nor closed.
        blocks.extend(fill(&store, 3, LARGE));
        drop(store);
        let (store, recovered) = start(&config);
        assert!(recovered.report.unclean);
        assert_eq!((recovered.report.entries, recovered.report.damaged), (blocks.len(), 0));
        assert_all_there(&store, &blocks);
    }
}

#[test]
fn a_segment_bound_anew_holds_nothing_of_before_also_after_a_kill() {
    let root = root();
    let config = config(directories(root.path(), 2), 4);
    let (store, _) = start(&config);
    let old = fill(&store, 1, SMALL);
    store.flush().unwrap();
    store.bind(SegmentId(1), LARGE);
    let block = Block { namespace: 5, key: 5, version: 5, bytes: 12_288 };
    assert_eq!(store.write(&[block.write(place(1, 0)), block.write(place(1, 1))]), [Ok(()), Ok(())]);
    assert!(old.iter().all(|(at, block)| block.read(&store, *at) == Err(ReadFailure::Absent)));
    drop(store);
    let (store, recovered) = start(&config);
    assert_eq!(recovered.segments.len(), 1);
    assert_eq!((recovered.segments[0].class, recovered.report.entries), (LARGE, 2));
    assert_eq!(block.read(&store, place(1, 0)), Ok(()));
}

#[test]
fn flipped_bits_are_never_delivered() {
    let root = root();
    let config = config(directories(root.path(), 2), 4);
    let (store, _) = start(&config);
    let blocks = fill(&store, 0, SMALL);
    let geometry = *store.geometry();
    store.close().unwrap();
    drop(store);
    // A byte of slot 4 (file 0, third there), and of the entries of slots 6 and 7.
    flip(&config.directories[0], geometry.slot_offset(SegmentId(0), 2, 4096) + 1000);
    let entry = |local: u64| geometry.offset(SegmentId(0)) + PAGE_BYTES as u64 + local * 128;
    flip(&config.directories[0], entry(3) + 40);
    flip(&config.directories[1], entry(3));
    let (store, recovered) = start(&config);
    assert_eq!((recovered.report.damaged, recovered.report.entries), (2, blocks.len() - 2));
    for (at, block) in &blocks {
        let expected = match at.index {
            4 => Err(ReadFailure::Corrupt),
            6 | 7 => Err(ReadFailure::Absent),
            _ => Ok(()),
        };
        assert_eq!(block.read(&store, *at), expected, "{at:?}");
    }
    store.forget(place(0, 4)).unwrap();
    assert_eq!(blocks[4].1.read(&store, place(0, 4)), Err(ReadFailure::Absent));
    store.close().unwrap();
    drop(store);
    let (store, recovered) = start(&config);
    assert_eq!((recovered.report.damaged, recovered.report.entries), (0, blocks.len() - 3));
    store.close().unwrap();
    drop(store);
    // The segment's header in one file.
    flip(&config.directories[1], geometry.offset(SegmentId(0)) + 33);
    let (store, recovered) = start(&config);
    assert_eq!((recovered.report.segments, recovered.report.segments_lost), (0, 1));
    assert_eq!(blocks[0].1.read(&store, place(0, 0)), Err(ReadFailure::Absent));
}

/// Else the block, stored anew elsewhere, would have two entries, and the next daemon might believe the bad one.
#[test]
fn a_forgotten_slot_is_empty_also_after_a_kill() {
    let root = root();
    let config = config(directories(root.path(), 2), 4);
    let (store, _) = start(&config);
    let blocks = fill(&store, 0, SMALL);
    store.flush().unwrap();
    store.forget(blocks[4].0).unwrap();
    drop(store);
    let (_store, recovered) = start(&config);
    assert_eq!((recovered.report.damaged, recovered.report.entries), (0, blocks.len() - 1));
}

#[test]
fn files_that_are_not_understood_are_refused_and_left_alone() {
    let root = root();
    let config = config(directories(root.path(), 1), 4);
    let directory = &config.directories[0];
    start(&config).0.close().unwrap();
    let intact = fs::read(cache_file(directory)).unwrap();
    let with_version = |version: u32| {
        let mut page: [u8; PAGE_BYTES] = intact[..PAGE_BYTES].try_into().unwrap();
        put(&mut page, 8, &version.to_le_bytes());
        seal_page(&mut page);
        file(directory).write_all_at(&page, 0).unwrap();
    };
    with_version(2);
    assert!(matches!(refused(&config, "version 2"), DiskError::Newer { found: 2, known: 1, .. }));
    with_version(0);
    assert!(matches!(refused(&config, "version 0"), DiskError::Older { found: 0, known: 1, .. }));
    for at in [8, 20, 300, 504, 511, 512, 4095] {
        fs::write(cache_file(directory), &intact).unwrap();
        flip(directory, at);
        assert!(matches!(refused(&config, "damaged header"), DiskError::Damaged { .. }), "{at}");
    }
    for bytes in [&b"x"[..], b"KVBM", &[0; 5000], &[7; 100_000]] {
        fs::write(cache_file(directory), bytes).unwrap();
        assert!(matches!(refused(&config, "not a disk cache"), DiskError::NotOurs { .. }));
    }
    fs::write(cache_file(directory), &intact[..1000]).unwrap();
    // The check, cut off.
    file(directory).set_len(400).unwrap();
    assert!(matches!(refused(&config, "damaged header"), DiskError::Damaged { .. }));
    let (store, recovered) = start(&DiskConfig { reset: true, ..config.clone() });
    assert!(recovered.segments.is_empty());
    store.close().unwrap();
    drop(store);
    start(&config);
}

#[test]
fn directories_of_another_set_are_refused() {
    let root = root();
    let both = directories(root.path(), 2);
    let of = |directories: Vec<PathBuf>| config(directories, 4);
    start(&of(both.clone())).0.close().unwrap();
    let strange = directories(&root.path().join("strange"), 2);
    start(&of(strange.clone())).0.close().unwrap();
    let new = root.path().join("new");
    let cases = [
        (vec![both[0].clone()], "a set of 2 files, not 1"),
        (vec![both[1].clone(), both[0].clone()], "file 2 of its set, not 1"),
        (vec![both[0].clone(), strange[1].clone()], "another set"),
        (vec![both[0].clone(), new.clone()], "is empty, but the others belong to a set of 2"),
        (vec![both[0].clone(), both[1].clone(), new], "a set of 2 files, not 3"),
    ];
    for (directories, words) in cases {
        assert!(matches!(refused(&of(directories), words), DiskError::OtherSet { .. }));
    }
    let twice = open(&of(vec![both[0].clone(), both[0].clone()])).unwrap_err();
    assert!(twice.to_string().contains("listed twice"), "{twice}");
    start(&of(both));
}

#[test]
fn a_second_daemon_is_refused_while_the_first_lives() {
    let root = root();
    let config = config(directories(root.path(), 2), 4);
    let (store, _) = start(&config);
    let blocks = fill(&store, 0, SMALL);
    for reset in [false, true] {
        let second = DiskConfig { reset, ..config.clone() };
        let error = open(&second).unwrap_err();
        assert!(matches!(error, DiskError::InUse { .. }), "{error}");
        assert!(error.to_string().contains("another daemon"), "{error}");
    }
    assert_all_there(&store, &blocks);
    drop(store);
    let (store, _) = start(&config);
    assert_all_there(&store, &blocks);
}

#[test]
fn a_file_that_was_cut_serves_what_is_left() {
    let root = root();
    let config = config(directories(root.path(), 2), 4);
    let (store, _) = start(&config);
    let blocks: Vec<_> = (0..4).map(|segment| fill(&store, segment, SMALL)).collect();
    store.close().unwrap();
    drop(store);
    let bytes = (1 << 20) + 2 * EXTENT + EXTENT / 2;
    file(&config.directories[1]).set_len(bytes).unwrap();
    let (store, recovered) = start(&config);
    assert_eq!((store.segment_count(), recovered.report.segments), (4, 2));
    assert_all_there(&store, &blocks[..2].concat());
    assert!(blocks[2..].concat().iter().all(|(at, block)| block.read(&store, *at).is_err()));
    let refilled = fill(&store, 2, LARGE);
    store.close().unwrap();
    drop(store);
    let (store, recovered) = start(&config);
    assert_eq!((recovered.report.segments, recovered.report.segments_lost), (3, 0));
    assert_all_there(&store, &[blocks[0].clone(), blocks[1].clone(), refilled].concat());
}

#[test]
fn capacity_grows_and_shrinks_by_whole_segments() {
    let root = root();
    let sized = |segments| config(directories(root.path(), 2), segments);
    let (store, _) = start(&sized(4));
    let blocks: Vec<_> = (0..4).map(|segment| fill(&store, segment, SMALL)).collect();
    let extent = store.geometry().extent_bytes;
    store.close().unwrap();
    drop(store);
    let (store, recovered) = start(&sized(6));
    assert_eq!((store.segment_count(), recovered.report.segments), (6, 4));
    assert_eq!(store.geometry().extent_bytes, extent);
    let added = fill(&store, 5, LARGE);
    assert_all_there(&store, &[blocks.concat(), added].concat());
    store.close().unwrap();
    drop(store);
    let (store, recovered) = start(&sized(2));
    assert_eq!((store.segment_count(), recovered.report.segments), (2, 2));
    assert_all_there(&store, &blocks[..2].concat());
    assert_eq!(fs::metadata(cache_file(&sized(2).directories[0])).unwrap().len(), (1 << 20) + 2 * EXTENT);
    store.close().unwrap();
    drop(store);
    let (store, recovered) = start(&sized(6));
    assert_eq!(recovered.report.segments, 2, "what was dropped does not come back");
    assert_all_there(&store, &blocks[..2].concat());
    drop(store);
    let less = open(&DiskConfig { capacity_bytes: 2 << 20, ..sized(4) }).unwrap_err();
    assert!(less.to_string().contains("less than one segment"), "{less}");
}

#[test]
fn reset_discards_everything_and_may_change_the_form() {
    let root = root();
    let two = config(directories(root.path(), 2), 4);
    let (store, _) = start(&two);
    let blocks = fill(&store, 0, SMALL);
    store.close().unwrap();
    drop(store);
    let one = DiskConfig { reset: true, ..config(two.directories[..1].to_vec(), 8) };
    let (store, recovered) = start(&one);
    assert!(recovered.segments.is_empty() && !recovered.report.unclean);
    assert!(blocks.iter().all(|(at, block)| block.read(&store, *at) == Err(ReadFailure::Absent)));
}

#[test]
fn too_little_space_is_told_at_the_start_and_leaves_the_files_their_size() {
    let root = root();
    let mut config = config(directories(root.path(), 1), 4);
    start(&config).0.close().unwrap();
    let before = fs::metadata(cache_file(&config.directories[0])).unwrap().len();
    config.capacity_bytes = u64::MAX;
    let store = open(&config).unwrap();
    let error = store.prepare(&|| false).unwrap_err();
    let DiskError::Io { op, source, .. } = &error else { panic!("{error}") };
    assert!(op.contains("reserve space"), "{error}");
    assert_eq!(source.kind(), std::io::ErrorKind::StorageFull, "{error}");
    store.close().unwrap();
    drop(store);
    assert_eq!(fs::metadata(cache_file(&config.directories[0])).unwrap().len(), before);
    config.capacity_bytes = capacity(1, 4);
    start(&config);
}

#[test]
fn directories_that_cannot_be_had_are_named() {
    let root = root();
    let taken = root.path().join("taken");
    fs::write(&taken, b"a file").unwrap();
    for directory in [taken.clone(), taken.join("below"), PathBuf::from("/proc/kvbm")] {
        let error = open(&config(vec![directory.clone()], 4)).unwrap_err();
        assert!(matches!(error, DiskError::Io { op: "create directory", .. }), "{error}");
        assert!(error.to_string().contains(directory.to_str().unwrap()), "{error}");
    }
    let odd = root.path().join("odd");
    fs::create_dir_all(cache_file(&odd)).unwrap();
    assert!(matches!(open(&config(vec![odd], 4)).unwrap_err(), DiskError::Io { op: "open", .. }));
    let linked = root.path().join("linked");
    fs::create_dir_all(&linked).unwrap();
    symlink(&taken, cache_file(&linked)).unwrap();
    assert!(matches!(open(&config(vec![linked], 4)).unwrap_err(), DiskError::Io { op: "open", .. }));
    assert_eq!(fs::read(&taken).unwrap(), b"a file");
    assert!(matches!(open(&config(Vec::new(), 4)), Err(DiskError::Config(_))));
    let small = DiskConfig { capacity_bytes: 1 << 20, ..config(directories(root.path(), 1), 4) };
    assert!(matches!(open(&small), Err(DiskError::Config(_))));
}

#[test]
fn a_start_that_was_stopped_can_be_repeated() {
    let root = root();
    let config = config(directories(root.path(), 2), 4);
    let store = open(&config).unwrap();
    assert!(matches!(store.prepare(&|| true), Err(DiskError::Stopped)));
    store.close().unwrap();
    drop(store);
    let (store, _) = start(&config);
    let blocks = fill(&store, 0, SMALL);
    store.close().unwrap();
    drop(store);
    let store = open(&config).unwrap();
    assert!(matches!(store.prepare(&|| true), Err(DiskError::Stopped)));
    store.close().unwrap();
    drop(store);
    let (store, recovered) = start(&config);
    assert_all_there(&store, &blocks);
    assert!(recovered.report.unclean, "nobody has closed it since it was opened for use");
}

#[test]
fn opening_and_closing_changes_nothing() {
    let root = root();
    let config = config(directories(root.path(), 1), 4);
    start(&config).0.close().unwrap();
    let before = fs::read(cache_file(&config.directories[0])).unwrap();
    open(&config).unwrap().close().unwrap();
    assert!(fs::read(cache_file(&config.directories[0])).unwrap() == before);
}

#[test]
fn a_set_whose_making_was_interrupted_is_made_again_in_any_form() {
    let root = root();
    let config = config(directories(root.path(), 2), 4);
    fs::create_dir_all(&config.directories[0]).unwrap();
    let header = FileHeader {
        state: SetState::Creating,
        set: [1; 16],
        file: 0,
        geometry: Geometry { files: 3, extent_bytes: 1 << 30 },
        segments: 7,
        created_at_s: 1,
    };
    fs::write(cache_file(&config.directories[0]), header.encode()).unwrap();
    let (store, _) = start(&config);
    assert_eq!((store.segment_count(), store.geometry().extent_bytes), (4, EXTENT));
    let blocks = fill(&store, 0, SMALL);
    assert_all_there(&store, &blocks);
}

#[test]
fn zeros_are_written_where_space_cannot_be_reserved_otherwise() {
    let root = root();
    let config = config(directories(root.path(), 1), 4);
    let store = open(&config).unwrap();
    let bytes = (5 << 20) + 4096;
    let fill = |stopping: &dyn Fn() -> bool| {
        super::super::allocate::fill(0, &store.files[0], 4096..bytes, store.pages().engine(), stopping)
    };
    assert!(matches!(fill(&|| true), Err(DiskError::Stopped)));
    fill(&|| false).unwrap();
    let written = fs::read(cache_file(&config.directories[0])).unwrap();
    assert!(written.len() as u64 == bytes && written.iter().all(|byte| *byte == 0));
    let blocks =
        std::os::unix::fs::MetadataExt::blocks(&fs::metadata(cache_file(&config.directories[0])).unwrap());
    assert!(blocks * 512 >= bytes - 4096, "the space is really there: {blocks}");
}
