//! Several threads at the same pages, and drives with no room.

use std::sync::Mutex;
use std::thread;

use super::super::recording::{Event, Image, Recording, Shuffling};
use super::*;

const THREADS: u32 = 3;

/// Prepared, over a drive that the test makes.
fn start_on<E: DiskIo + 'static>(
    config: &DiskConfig,
    make: impl Fn(Vec<File>) -> E,
) -> (DiskStore, Arc<E>, Recovered) {
    let made = Mutex::new(None);
    let engine = |files| -> EngineResult {
        let engine = Arc::new(make(files));
        *made.lock().unwrap() = Some(Arc::clone(&engine));
        Ok(engine)
    };
    let store = DiskStore::open(config, &engine).unwrap();
    let recovered = store.prepare(&|| false).unwrap();
    (store, made.into_inner().unwrap().expect("it was made"), recovered)
}

#[test]
fn writers_of_the_same_page_never_leave_an_older_state_of_it_on_disk() {
    for seed in 0..15 {
        let root = tempfile::tempdir().unwrap();
        let config = config(directories(root.path(), 2), 4);
        let recording = Mutex::new(None);
        let (store, _, _) = start_on(&config, |files| {
            let made = Arc::new(Recording::new(files, Vec::new()));
            *recording.lock().unwrap() = Some(Arc::clone(&made));
            Shuffling::new(made, seed)
        });
        store.bind(SegmentId(0), SMALL);
        let slots = store.slots_in().count(SMALL.stride);
        let (store, recording) = (&store, recording.into_inner().unwrap().unwrap());
        let written: Vec<(DiskPlace, Block)> = thread::scope(|scope| {
            let writer = |number: u32| {
                move || {
                    let mut latest = Vec::new();
                    let mut random = Random::new(seed << 8 | u64::from(number));
                    for round in 0..6_u64 {
                        let mine = (number..slots).step_by(THREADS as usize).filter(|_| random.one_in(2));
                        let blocks: Vec<(DiskPlace, Block)> = mine
                            .map(|index| {
                                let version = round << 32 | u64::from(index) << 16 | seed;
                                let block = Block { namespace: 7, key: index as u8, version, bytes: 4096 };
                                (place(0, index), block)
                            })
                            .collect();
                        latest.retain(|(place, _)| blocks.iter().all(|(other, _)| other != place));
                        let writes: Vec<DiskWrite> =
                            blocks.iter().map(|(p, block)| block.write(*p)).collect();
                        assert!(store.write(&writes).iter().all(Result::is_ok));
                        assert_all_there(store, &blocks);
                        latest.extend(blocks);
                    }
                    latest
                }
            };
            let writers: Vec<_> = (0..THREADS).map(|number| scope.spawn(writer(number))).collect();
            let flusher = scope.spawn(|| {
                for number in 0..20 {
                    // Another segment comes and goes meanwhile.
                    store.bind(SegmentId(1), [SMALL, LARGE][number % 2]);
                    store.flush().unwrap();
                }
            });
            flusher.join().unwrap();
            writers.into_iter().flat_map(|writer| writer.join().unwrap()).collect()
        });
        // As after a kill: nothing is flushed, and what the drive was told is all there is.
        let images = recording.live();
        store.pages().engine().close();
        drop_and_check(&config, images, &written);
    }
}

fn drop_and_check(config: &DiskConfig, images: Vec<Image>, written: &[(DiskPlace, Block)]) {
    let elsewhere = tempfile::tempdir().unwrap();
    let directories = directories(elsewhere.path(), images.len());
    for ((from, to), image) in config.directories.iter().zip(&directories).zip(&images) {
        std::fs::create_dir_all(to).unwrap();
        let size = std::fs::metadata(cache_file(from)).unwrap().len();
        std::fs::write(cache_file(to), image.read(0, size as usize)).unwrap();
    }
    let (store, recovered) = start(&DiskConfig { directories, ..config.clone() });
    assert_eq!(recovered.report.entries, written.len());
    assert_eq!(recovered.report.damaged, 0);
    assert_all_there(&store, written);
}

/// Answers are in the caller's order, with failures among them, whatever the order on the drive.
#[test]
fn a_batch_may_be_in_any_order_and_goes_to_the_drive_in_that_of_its_places() {
    let root = tempfile::tempdir().unwrap();
    let config = config(directories(root.path(), 1), 4);
    let (store, drive, _) = start_on(&config, |files| Recording::new(files, Vec::new()));
    store.bind(SegmentId(0), SMALL);
    let mut random = Random::new(5);
    let mut places: Vec<DiskPlace> = (0..24).map(|index| place(u32::from(index % 4 == 3), index)).collect();
    random.shuffle(&mut places);
    let block = |place: &DiskPlace| {
        let number = u64::from(place.index);
        Block { namespace: 7, key: place.index as u8, version: number, bytes: 4096 }
    };
    let logged = drive.log().len();
    let writes: Vec<DiskWrite> = places.iter().map(|place| block(place).write(*place)).collect();
    let written = store.write(&writes);
    for (place, result) in places.iter().zip(&written) {
        let expected = if place.segment.0 == 0 { Ok(()) } else { Err(WriteFailure::Unbound) };
        assert_eq!(*result, expected, "{place:?}");
    }
    let stored: Vec<DiskPlace> = places.iter().copied().filter(|place| place.segment.0 == 0).collect();
    let payloads: Vec<Vec<u8>> = stored.iter().map(|place| block(place).payload()).collect();
    let offsets: Vec<u64> = drive.log()[logged..]
        .iter()
        .filter_map(|event| match event {
            Event::Write { offset, bytes, .. } => payloads.contains(bytes).then_some(*offset),
            Event::Sync { .. } => None,
        })
        .collect();
    assert_eq!(offsets.len(), stored.len());
    assert!(offsets.is_sorted(), "{offsets:?}");
    random.shuffle(&mut places);
    let (memory, _) = scratch(4096);
    let wanted = |(at, place): (usize, &DiskPlace)| DiskRead {
        place: *place,
        namespace: [7; 32],
        key: [place.index as u8; 16],
        target: Arc::clone(&memory),
        target_offset: at * 4096,
        bytes: 4096,
    };
    let results = store.read(&places.iter().enumerate().map(wanted).collect::<Vec<_>>());
    for (at, (place, result)) in places.iter().zip(results).enumerate() {
        let expected = if place.segment.0 == 0 { Ok(()) } else { Err(ReadFailure::Absent) };
        assert_eq!(result, expected, "{place:?}");
        let mut found = vec![0; 4096];
        memory.read(at * 4096, &mut found);
        assert!(expected.is_err() || found == block(place).payload(), "{place:?}");
    }
}

#[test]
fn a_drive_that_takes_one_io_at_a_time_serves_as_well() {
    let root = tempfile::tempdir().unwrap();
    let config = config(directories(root.path(), 2), 4);
    let (store, drive, _) = start_on(&config, |files| Recording::with_batches_of(files, Vec::new(), 1));
    let blocks = [fill(&store, 0, SMALL), fill(&store, 3, LARGE)].concat();
    assert_all_there(&store, &blocks);
    store.flush().unwrap();
    store.close().unwrap();
    drop(store);
    drop_and_check(&config, drive.live(), &blocks);
}

#[test]
fn a_drive_that_takes_nothing_more_is_an_answer() {
    let root = tempfile::tempdir().unwrap();
    let config = config(directories(root.path(), 1), 4);
    let (store, drive, _) = start_on(&config, |files| Recording::new(files, Vec::new()));
    let (at, block) = fill(&store, 0, SMALL)[0];
    drive.close();
    let abandoned = crate::store::disk_io::IoFailure::Abandoned;
    assert_eq!(block.read(&store, at), Err(ReadFailure::Io(abandoned)));
    assert_eq!(store.write(&[block.write(at)]), [Err(WriteFailure::Io(abandoned))]);
    assert_eq!(store.flush(), Err(abandoned));
    assert!(store.close().is_err(), "what could not be flushed is not called clean");
}

#[test]
fn a_failed_write_is_told_and_the_next_flush_makes_up_for_lost_pages() {
    let root = tempfile::tempdir().unwrap();
    let config = config(directories(root.path(), 2), 4);
    let (store, drive, _) = start_on(&config, |files| Recording::new(files, Vec::new()));
    let mut blocks = fill(&store, 0, SMALL);
    drive.fail_one_in(1, 1);
    let (at, block) = blocks.remove(0);
    let overwrite = Block { version: 99, ..block };
    let failed = crate::store::disk_io::IoFailure::Os(5);
    assert_eq!(store.write(&[overwrite.write(at)]), [Err(WriteFailure::Io(failed))]);
    assert_eq!(block.read(&store, at), Err(ReadFailure::Absent));
    assert_eq!(store.flush(), Err(failed));
    drive.work_again();
    assert_eq!(store.flush(), Ok(()));
    drop(store);
    drop_and_check(&config, drive.live(), &blocks);
}

#[test]
fn places_that_are_not_there_are_answers() {
    let root = tempfile::tempdir().unwrap();
    let (store, _) = start(&config(directories(root.path(), 2), 4));
    let block = Block { namespace: 1, key: 1, version: 1, bytes: 4096 };
    store.bind(SegmentId(0), SMALL);
    let behind = place(0, store.slots_in().count(SMALL.stride));
    for at in [place(1, 0), behind, place(77, 0)] {
        assert_eq!(store.write(&[block.write(at)]), [Err(WriteFailure::Unbound)], "{at:?}");
        assert_eq!(block.read(&store, at), Err(ReadFailure::Absent), "{at:?}");
        store.forget(at).unwrap();
    }
    let larger = Block { bytes: 4097, ..block };
    assert_eq!(store.write(&[larger.write(place(0, 0))]), [Err(WriteFailure::Unbound)]);
    assert_eq!(store.write(&[block.write(place(0, 0))]), [Ok(())]);
    for other in [Block { namespace: 2, ..block }, Block { key: 2, ..block }, Block { bytes: 4095, ..block }]
    {
        assert_eq!(other.read(&store, place(0, 0)), Err(ReadFailure::Absent));
    }
    store.forget(place(0, 0)).unwrap();
    assert_eq!(block.read(&store, place(0, 0)), Err(ReadFailure::Absent));
    assert!(store.write(&[]).is_empty() && store.read(&[]).is_empty());
}

#[test]
fn what_concerns_the_engine_reaches_it() {
    let root = tempfile::tempdir().unwrap();
    let config = config(directories(root.path(), 1), 4);
    let (store, drive, _) = start_on(&config, |files| Recording::new(files, Vec::new()));
    let memory = Arc::new(SharedMemory::create("host", 4096).unwrap());
    assert!(!drive.is_registered(&memory));
    store.register(&memory);
    assert!(drive.is_registered(&memory));
    assert_eq!(store.load().overdue, 0);
    store.abandon_waiting();
    assert_eq!(store.load().overdue, 1, "this drive tells so that it was asked to");
}
