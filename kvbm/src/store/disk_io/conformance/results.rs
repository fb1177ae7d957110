//! Bytes and results.

use std::os::unix::fs::FileExt;

use super::super::{IO_BYTES_MAX, IoFailure};
use super::*;

super::for_each_engine!(
    random_batches_do_what_a_model_says_past_the_page_cache,
    random_batches_do_what_a_model_says_through_the_page_cache,
    queues_of_length_one_change_no_byte,
    a_read_beyond_the_end_is_short,
    unaligned_bytes_are_moved_exactly,
    what_the_kernel_refuses_is_its_error,
    one_bad_io_does_not_touch_its_neighbours,
    a_full_drive_is_an_error,
    an_empty_batch_finishes,
    bytes_outside_the_memory_are_a_bug_of_the_caller,
);

const PAGE: usize = 4096;
const PAGES: usize = 512;

fn random_batches_do_what_a_model_says_past_the_page_cache(subject: Subject) {
    random_batches(subject, true, IoOptions { depth: 32, ..patient() }, 30);
}

fn random_batches_do_what_a_model_says_through_the_page_cache(subject: Subject) {
    random_batches(subject, false, IoOptions { depth: 32, bytes_in_flight_max: 64 << 10, ..patient() }, 30);
}

fn queues_of_length_one_change_no_byte(subject: Subject) {
    let short = IoOptions { depth: 1, bytes_in_flight_max: 1, waiting_writes_max: 1, ..patient() };
    random_batches(subject, true, IoOptions { waiting_reads_max: 1, ..short }, 5);
}

/// Rounds of batches that are under way together. No two touch the same page of the file or of memory.
fn random_batches(subject: Subject, direct: bool, options: IoOptions, rounds: u64) {
    let (file, check) = open(direct);
    let mut model = vec![0; PAGES * PAGE];
    check.write_all_at(&model, 0).unwrap();
    let engine = subject.start(vec![file], options);
    let memories = [memory(PAGES * PAGE / 2), memory(PAGES * PAGE / 2)];
    // One of the two is registered.
    engine.register(&memories[0]);
    let mut random = Random(0x9E37_79B9_7F4A_7C15 ^ rounds);
    for round in 0..rounds {
        let (mut reads, mut writes) = (Vec::new(), Vec::new());
        let mut batches: Vec<Vec<Io>> = (0..4).map(|_| Vec::new()).collect();
        let mut memory_page = 0;
        let mut file_pages = extents(&mut random);
        while let Some((file_page, pages)) = file_pages.pop() {
            let len = pages * PAGE;
            // The upper half of the pages lies in the second memory; no I/O spans both.
            let half = PAGES / 2;
            if memory_page < half && memory_page + pages > half {
                memory_page = half;
            }
            if memory_page + pages > PAGES {
                break;
            }
            let (memory, at) = (&memories[memory_page / half], memory_page % half * PAGE);
            memory_page += pages;
            let (start, batch) = (file_page * PAGE, &mut batches[random.below(4)]);
            if random.below(2) == 0 {
                memory.write(at, &vec![0xEE; len]);
                batch.push(super::read(0, start as u64, memory, at, len));
                reads.push((start, memory, at, len));
            } else {
                let bytes: Vec<u8> = (0..len).map(|i| (round as usize + file_page + i / 7) as u8).collect();
                memory.write(at, &bytes);
                batch.push(super::write(0, start as u64, memory, at, len));
                writes.push((start, bytes));
            }
            if random.below(20) == 0 {
                batch.push(Io::Sync { file: 0 });
            }
        }
        let mut told = Vec::new();
        for ios in batches {
            let len = ios.len();
            told.push((len, submit_when_there_is_room(&engine, ios)));
        }
        for (len, told) in told {
            assert_eq!(told.recv().unwrap(), vec![Ok(()); len]);
        }
        for (start, memory, at, len) in reads {
            let mut seen = vec![0; len];
            memory.read(at, &mut seen);
            assert!(seen == model[start..start + len], "round {round}: read at {start}");
        }
        for (start, bytes) in writes {
            model[start..start + bytes.len()].copy_from_slice(&bytes);
        }
    }
    engine.close();
    let mut seen = vec![0; model.len()];
    check.read_exact_at(&mut seen, 0).unwrap();
    assert!(seen == model, "the file differs from the model");
}

fn submit_when_there_is_room(engine: &Arc<dyn DiskIo>, ios: Vec<Io>) -> mpsc::Receiver<Vec<IoResult>> {
    let (tell, told) = mpsc::channel();
    let mut batch = IoBatch { ios, finished: Box::new(move |results| tell.send(results).unwrap()) };
    while let Err(given_back) = engine.submit(batch) {
        batch = given_back;
        std::thread::yield_now();
    }
    told
}

/// The pages of the file in pieces of 1 to 16, in random order.
fn extents(random: &mut Random) -> Vec<(usize, usize)> {
    let (mut pieces, mut page) = (Vec::new(), 0);
    while page < PAGES {
        let pages = (1 + random.below(16)).min(PAGES - page);
        pieces.push((page, pages));
        page += pages;
    }
    for i in (1..pieces.len()).rev() {
        pieces.swap(i, random.below(i + 1));
    }
    pieces
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

fn a_read_beyond_the_end_is_short(subject: Subject) {
    for direct in [true, false] {
        let (file, check) = open(direct);
        check.write_all_at(&[5; 2 * PAGE], 0).unwrap();
        let (engine, memory) = (subject.start(vec![file], patient()), memory(8 * PAGE));
        let read = |offset: usize| super::read(0, offset as u64, &memory, 0, 2 * PAGE);
        let results = carry_out_all(&engine, vec![read(PAGE), read(2 * PAGE)]);
        let short = |moved| Err(IoFailure::Short { moved, wanted: 2 * PAGE });
        assert_eq!(results, [short(PAGE), short(0)], "direct: {direct}");
    }
}

fn unaligned_bytes_are_moved_exactly(subject: Subject) {
    let (file, check) = open(false);
    check.write_all_at(b"abcdefghij", 0).unwrap();
    let (engine, memory) = (subject.start(vec![file], patient()), memory(PAGE));
    memory.write(11, b"XYZ");
    let ios = vec![super::read(0, 1, &memory, 101, 4), super::write(0, 7, &memory, 11, 3)];
    assert_eq!(carry_out_all(&engine, ios), [Ok(()), Ok(())]);
    let (mut in_memory, mut in_file) = ([0; 6], [0; 10]);
    memory.read(100, &mut in_memory);
    check.read_exact_at(&mut in_file, 0).unwrap();
    assert_eq!((&in_memory, &in_file), (b"\0bcde\0", b"abcdefgXYZ"));
}

fn what_the_kernel_refuses_is_its_error(subject: Subject) {
    let os = |errno: Errno| Err(IoFailure::Os(errno.raw_os_error()));
    let (file, _) = open(false);
    let read_only = File::open("/dev/null").unwrap();
    let write_only = File::options().write(true).open("/dev/null").unwrap();
    let (pipe, _stall) = Stall::new();
    let (engine, memory) = (subject.start(vec![file, read_only, write_only, pipe], patient()), memory(PAGE));
    let ios =
        vec![super::write(1, 0, &memory, 0, PAGE), super::read(2, 0, &memory, 0, PAGE), Io::Sync { file: 3 }];
    let expected = [os(Errno::BADF), os(Errno::BADF), os(Errno::INVAL)];
    // The sync would wait for the write; it is none of its business that the write failed.
    assert_eq!(carry_out_all(&engine, ios), expected);
}

fn one_bad_io_does_not_touch_its_neighbours(subject: Subject) {
    let (file, _) = open(true);
    let closed_for_writes = File::open("/dev/null").unwrap();
    let (engine, memory) = (subject.start(vec![file, closed_for_writes], patient()), memory(16 * PAGE));
    let ios = (0..16).map(|i| super::write(usize::from(i == 5), (i * PAGE) as u64, &memory, i * PAGE, PAGE));
    for (i, result) in carry_out_all(&engine, ios.collect()).into_iter().enumerate() {
        assert_eq!(result.is_err(), i == 5);
    }
}

fn a_full_drive_is_an_error(subject: Subject) {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let (engine, memory) = (subject.start(vec![full], patient()), memory(PAGE));
    let results = carry_out_all(&engine, vec![super::write(0, 0, &memory, 0, PAGE)]);
    assert_eq!(results, [Err(IoFailure::Os(Errno::NOSPC.raw_os_error()))]);
}

fn an_empty_batch_finishes(subject: Subject) {
    let engine = subject.start(vec![], patient());
    assert_eq!(carry_out_all(&engine, vec![]), []);
}

fn bytes_outside_the_memory_are_a_bug_of_the_caller(subject: Subject) {
    let (file, _) = open(false);
    let (engine, memory) = (subject.start(vec![file], patient()), memory(PAGE));
    let bad = [
        super::read(0, 0, &memory, 1, PAGE),
        super::write(0, 0, &memory, usize::MAX, 2),
        super::read(0, 0, &memory, 0, IO_BYTES_MAX + 1),
        super::read(1, 0, &memory, 0, PAGE),
        super::read(0, u64::MAX, &memory, 0, PAGE),
    ];
    for io in bad {
        let attempt = || engine.submit(IoBatch { ios: vec![io], finished: Box::new(|_| {}) });
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(attempt)).is_err());
    }
    assert_eq!(engine.load(), super::super::IoLoad::default());
}
