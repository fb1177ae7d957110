//! Who goes first, who waits, and how it ends.

use super::super::{IoFailure, Overdue};
use super::*;

super::for_each_engine!(
    reads_go_before_writes_that_wait,
    a_sync_follows_the_writes_of_its_batch,
    a_full_queue_gives_the_batch_back,
    a_closed_engine_gives_the_batch_back,
    closing_waits_for_everything_accepted,
    what_waits_is_given_up_while_the_drive_is_stuck,
    nothing_is_let_go_before_the_kernel_is_done,
    an_overdue_io_is_counted_and_ends_when_the_kernel_says,
    what_the_kernel_puts_off_is_tried_again,
    what_the_kernel_puts_off_for_too_long_is_timed_out,
    whoever_is_told_may_submit,
    a_panic_of_whoever_is_told_harms_nobody_else,
    a_dropped_engine_ends_what_it_accepted,
);

const PAGE: usize = 4096;

/// An engine that does one thing at a time and is busy with a read that does not end, besides it a usable file.
fn stuck(subject: Subject, options: IoOptions) -> (Arc<dyn DiskIo>, Stall, mpsc::Receiver<Vec<IoResult>>) {
    let (pipe, stall) = Stall::new();
    let (file, _) = open(false);
    let engine = subject.start(vec![pipe, file], IoOptions { depth: 1, ..options });
    let first = submit(&engine, vec![read(0, 0, &memory(PAGE), 0, Stall::LEN)]);
    until(&engine, |load| load.in_flight == 1);
    (engine, stall, first)
}

/// Submits and notes the name when it is finished.
fn noted(engine: &Arc<dyn DiskIo>, ios: Vec<Io>, name: &'static str, notes: &mpsc::Sender<&'static str>) {
    let notes = notes.clone();
    let finished = Box::new(move |_| notes.send(name).unwrap());
    engine.submit(IoBatch { ios, finished }).unwrap();
}

fn reads_go_before_writes_that_wait(subject: Subject) {
    let (engine, mut stall, _first) = stuck(subject, patient());
    let (note, notes) = mpsc::channel();
    let memory = memory(4 * PAGE);
    noted(&engine, vec![write(1, 0, &memory, 0, PAGE)], "write", &note);
    noted(&engine, vec![write(1, 8192, &memory, 0, PAGE)], "second write", &note);
    noted(&engine, vec![Io::Sync { file: 1 }], "sync", &note);
    noted(&engine, vec![read(1, 0, &memory, PAGE, PAGE)], "read", &note);
    assert_eq!(engine.load().waiting, 4);
    stall.release();
    engine.close();
    drop(note);
    let order: Vec<_> = notes.iter().collect();
    assert_eq!(order, ["read", "sync", "write", "second write"]);
}

fn a_sync_follows_the_writes_of_its_batch(subject: Subject) {
    // One sync is the first I/O of the older batch, and yet the other one goes before it: it waits for its write.
    let (engine, mut stall, _first) = stuck(subject, patient());
    let (note, notes) = mpsc::channel();
    let memory = memory(4 * PAGE);
    noted(&engine, vec![Io::Sync { file: 1 }, write(1, 0, &memory, 0, PAGE)], "with a write", &note);
    noted(&engine, vec![Io::Sync { file: 1 }], "alone", &note);
    stall.release();
    engine.close();
    drop(note);
    assert_eq!(notes.iter().collect::<Vec<_>>(), ["alone", "with a write"]);
}

fn a_full_queue_gives_the_batch_back(subject: Subject) {
    let options = IoOptions { waiting_writes_max: 3, waiting_reads_max: 2, ..patient() };
    let (engine, mut stall, _first) = stuck(subject, options);
    let memory = memory(PAGE);
    let writes = |count| (0..count).map(|_| write(1, 0, &memory, 0, PAGE)).collect::<Vec<_>>();
    let reads = |count| (0..count).map(|_| read(1, 0, &memory, 0, 1)).collect::<Vec<_>>();
    let two = submit(&engine, writes(2));
    let (tell, told) = mpsc::channel();
    let finished = Box::new(move |results| tell.send(results).unwrap());
    let given_back = engine.submit(IoBatch { ios: writes(2), finished }).unwrap_err();
    assert_eq!(given_back.ios.len(), 2);
    let third = submit(&engine, writes(1));
    let both = submit(&engine, reads(2));
    assert!(engine.submit(IoBatch { ios: reads(1), finished: Box::new(|_| {}) }).is_err());
    assert_eq!(engine.load().waiting, 5);
    stall.release();
    assert_eq!(
        (two.recv().unwrap().len(), third.recv().unwrap().len(), both.recv().unwrap().len()),
        (2, 1, 2)
    );
    // What was given back is whole, and can be handed in again.
    engine.submit(given_back).unwrap();
    assert_eq!(told.recv().unwrap(), [Ok(()), Ok(())]);
}

fn a_closed_engine_gives_the_batch_back(subject: Subject) {
    let (file, _) = open(false);
    let engine = subject.start(vec![file], patient());
    engine.close();
    engine.close();
    engine.abandon_waiting();
    engine.register(&memory(PAGE));
    let batch = IoBatch { ios: vec![Io::Sync { file: 0 }], finished: Box::new(|_| panic!("not accepted")) };
    assert_eq!(engine.submit(batch).unwrap_err().ios.len(), 1);
}

fn closing_waits_for_everything_accepted(subject: Subject) {
    let (engine, mut stall, first) = stuck(subject, patient());
    let waiting = submit(&engine, vec![write(1, 0, &memory(PAGE), 0, PAGE), Io::Sync { file: 1 }]);
    let (closed, is_closed) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            engine.close();
            closed.send(()).unwrap();
        });
        // Once it takes nothing more, it is closing.
        let accepted = || engine.submit(IoBatch { ios: vec![], finished: Box::new(|_| {}) }).is_ok();
        while accepted() {
            std::thread::yield_now();
        }
        assert_eq!(is_closed.try_recv(), Err(mpsc::TryRecvError::Empty));
        assert_eq!(first.try_recv(), Err(mpsc::TryRecvError::Empty));
        stall.release();
        is_closed.recv().unwrap();
        assert_eq!((first.try_recv().unwrap(), waiting.try_recv().unwrap()), (vec![Ok(())], vec![Ok(()); 2]));
    });
}

fn what_waits_is_given_up_while_the_drive_is_stuck(subject: Subject) {
    let (engine, mut stall, first) = stuck(subject, patient());
    let memory = memory(PAGE);
    let writes = submit(&engine, vec![write(1, 0, &memory, 0, PAGE), Io::Sync { file: 1 }]);
    let reads = submit(&engine, vec![read(1, 0, &memory, 0, PAGE)]);
    engine.abandon_waiting();
    assert_eq!(writes.recv().unwrap(), [Err(IoFailure::Abandoned); 2]);
    assert_eq!(reads.recv().unwrap(), [Err(IoFailure::Abandoned)]);
    assert_eq!((engine.load().in_flight, engine.load().waiting), (1, 0));
    // The engine still works.
    let later = submit(&engine, vec![write(1, 0, &memory, 0, PAGE)]);
    stall.release();
    assert_eq!((first.recv().unwrap(), later.recv().unwrap()), (vec![Ok(())], vec![Ok(())]));
}

fn nothing_is_let_go_before_the_kernel_is_done(subject: Subject) {
    let (pipe, mut stall) = Stall::new();
    let engine = subject.start(vec![pipe], patient());
    let memory = memory(PAGE);
    let told = submit(&engine, vec![read(0, 0, &memory, 0, Stall::LEN)]);
    until(&engine, |load| load.in_flight == 1);
    let weak = Arc::downgrade(&memory);
    drop(memory);
    engine.abandon_waiting();
    assert!(weak.strong_count() > 0, "the kernel may still write there");
    let kept = weak.upgrade().unwrap();
    stall.release();
    assert_eq!(told.recv().unwrap(), [Ok(())]);
    let mut bytes = [0; Stall::LEN];
    kept.read(0, &mut bytes);
    assert_eq!(bytes, [7; Stall::LEN], "it was finished after the last byte had come");
    drop(kept);
    engine.close();
    assert_eq!(weak.strong_count(), 0, "afterwards nobody keeps it");
}

fn an_overdue_io_is_counted_and_ends_when_the_kernel_says(subject: Subject) {
    let options = IoOptions { deadline: Duration::ZERO, overdue: Overdue::Wait, ..patient() };
    let (engine, mut stall, first) = stuck(subject, options);
    until(&engine, |load| load.overdue == 1 && load.oldest > Duration::ZERO);
    // Others come and go meanwhile; this one does not.
    assert_eq!(carry_out_all(&engine, vec![]), []);
    assert_eq!(first.try_recv(), Err(mpsc::TryRecvError::Empty));
    stall.release();
    assert_eq!(first.recv().unwrap(), [Ok(())]);
    until(&engine, |load| load == super::super::IoLoad::default());
}

/// A pipe that says "try again" when it is empty.
fn reluctant() -> (File, Stall) {
    let (pipe, stall) = Stall::new();
    rustix::fs::fcntl_setfl(&pipe, OFlags::NONBLOCK).unwrap();
    (pipe, stall)
}

fn what_the_kernel_puts_off_is_tried_again(subject: Subject) {
    let (pipe, mut stall) = reluctant();
    let engine = subject.start(vec![pipe], patient());
    let told = submit(&engine, vec![read(0, 0, &memory(PAGE), 0, Stall::LEN)]);
    // Several attempts long.
    until(&engine, |load| load.oldest > Duration::from_millis(5));
    assert_eq!(told.try_recv(), Err(mpsc::TryRecvError::Empty));
    stall.release();
    assert_eq!(told.recv().unwrap(), [Ok(())]);
}

fn what_the_kernel_puts_off_for_too_long_is_timed_out(subject: Subject) {
    let (pipe, _stall) = reluctant();
    let engine = subject.start(vec![pipe], IoOptions { deadline: Duration::from_millis(5), ..patient() });
    let results = carry_out_all(&engine, vec![read(0, 0, &memory(PAGE), 0, Stall::LEN)]);
    assert_eq!(results, [Err(IoFailure::TimedOut)]);
}

fn whoever_is_told_may_submit(subject: Subject) {
    fn next(engine: &Arc<dyn DiskIo>, memory: &Arc<SharedMemory>, left: usize, tell: mpsc::Sender<()>) {
        let (mine, bytes) = (Arc::clone(engine), Arc::clone(memory));
        let finished = Box::new(move |results: Vec<IoResult>| {
            assert_eq!(results, [Ok(())]);
            if left == 0 { tell.send(()).unwrap() } else { next(&mine, &bytes, left - 1, tell) }
        });
        engine.submit(IoBatch { ios: vec![write(0, 0, memory, 0, PAGE)], finished }).unwrap();
    }
    let (file, _) = open(false);
    let engine = subject.start(vec![file], IoOptions { depth: 1, ..patient() });
    let (tell, told) = mpsc::channel();
    next(&engine, &memory(PAGE), 100, tell);
    told.recv().unwrap();
}

fn a_panic_of_whoever_is_told_harms_nobody_else(subject: Subject) {
    let (engine, mut stall, first) = stuck(subject, patient());
    let finished = Box::new(|_: Vec<IoResult>| panic!("a panic, as this test wants it"));
    engine.submit(IoBatch { ios: vec![Io::Sync { file: 1 }], finished }).unwrap();
    let later = submit(&engine, vec![Io::Sync { file: 1 }]);
    stall.release();
    assert_eq!((first.recv().unwrap(), later.recv().unwrap()), (vec![Ok(())], vec![Ok(())]));
}

fn a_dropped_engine_ends_what_it_accepted(subject: Subject) {
    let (engine, mut stall, first) = stuck(subject, patient());
    let waiting = submit(&engine, vec![Io::Sync { file: 1 }]);
    drop(engine);
    stall.release();
    assert_eq!((first.recv().unwrap(), waiting.recv().unwrap()), (vec![Ok(())], vec![Ok(())]));
}
