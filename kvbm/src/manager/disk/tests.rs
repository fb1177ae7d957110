//! The manager over real files, and over drives that misbehave.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use kvbm_hash::SequenceHash;
use kvbm_shm::SharedMemory;

use super::*;
use crate::ledger::{AdmissionRules, Ledger, Millis, Retention};
use crate::manager::tests::{Engine, with_host};
use crate::store::disk_io::{IoBatch, IoFailure};
use crate::{Manager, ManagerConfig, Prefetched, Refused, Route, Tier};

const STRIDE: u64 = 8192;

fn config(directories: &[&Path]) -> ManagerConfig {
    let directories = directories.iter().map(|path| path.to_path_buf()).collect();
    let mut disk = DiskTierConfig::new(directories, DiskCapacity::Bytes(16 << 20));
    disk.rules.admission = AdmissionRules { frequency_filter: false, priority_min: 0, bytes_per_day: None };
    disk.rules.idle = Millis(0);
    ManagerConfig { disk: Some(disk), ..with_host(1 << 20) }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < Duration::from_secs(60), "waited in vain until {what}");
        std::thread::yield_now();
    }
}

fn state(manager: &Manager) -> DiskState {
    manager.disk().expect("it is configured").state
}

fn start(config: ManagerConfig) -> Manager {
    let manager = Manager::start(config).unwrap();
    serving(&manager);
    manager
}

fn serving(manager: &Manager) {
    until("host memory is there", || manager.host_bytes().0 == manager.host_bytes().1);
    until("the disk tier serves", || match state(manager) {
        DiskState::Out(reason) => panic!("{reason}"),
        state => state == DiskState::On,
    });
}

/// Computes a chain and waits until all of it is on disk.
fn sink(engine: &Engine, tokens: std::ops::Range<u32>) -> Vec<SequenceHash> {
    let keys = engine.keys(&tokens.collect::<Vec<_>>());
    let blocks = engine.compute(&keys);
    assert_eq!(engine.offloaded(&blocks).blocks_failed, 0);
    until("it is on disk", || on_disk(&engine.manager, &keys));
    engine.release(&blocks);
    keys
}

fn on_disk(manager: &Manager, keys: &[SequenceHash]) -> bool {
    manager.tick();
    let events = manager.residents().stored;
    keys.iter().all(|key| {
        events.iter().any(|event| {
            event.tier == Tier::Disk
                && matches!(event.kind, crate::EventKind::Stored { key: stored, .. } if stored == *key)
        })
    })
}

fn prefetch(engine: &Engine, keys: &[SequenceHash]) -> Prefetched {
    let (send, receive) = mpsc::channel();
    let done = Box::new(move |found| send.send(found).unwrap());
    engine.manager.prefetch_and_wait(engine.session, engine.namespace, keys, done).unwrap();
    receive.recv().unwrap()
}

/// Takes a prefix into the pool; returns how many blocks there were.
fn fetch(engine: &Engine, keys: &[SequenceHash]) -> usize {
    prefetch(engine, keys);
    let matched = engine.manager.match_prefix(engine.session, engine.namespace, keys, None, &[]).unwrap();
    let Some(lease) = matched.lease else { return 0 };
    let targets = engine.granted(matched.host_blocks);
    assert_eq!(engine.onboard(lease, &targets).unwrap().blocks_done, matched.host_blocks);
    engine.check(&targets, keys);
    engine.release(&targets);
    matched.host_blocks
}

/// Changes a byte of every copy of a block in the files of a directory.
fn flip(directory: &Path, key: SequenceHash) -> usize {
    let path = directory.join("kvbm-disk-cache");
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let (mut bytes, pattern) = (Vec::new(), Engine::bytes_of(key));
    std::io::Read::read_to_end(&mut &file, &mut bytes).unwrap();
    let places: Vec<usize> =
        (0..bytes.len()).step_by(4096).filter(|at| bytes[*at..].starts_with(&pattern)).collect();
    for at in &places {
        file.write_at(&[bytes[at + 100] ^ 1], *at as u64 + 100).unwrap();
    }
    places.len()
}

/// Priority of a block on disk, and whether it holds for a time only.
fn kept_on_disk(manager: &Manager, key: SequenceHash) -> Option<Retention> {
    manager.inspect(|ledger| ledger.retention_on_disk(key))
}

#[test]
fn priorities_come_back_from_disk_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let config = config(&[directory.path()]);
    let manager = start(config.clone());
    let engine = Engine::attach(&manager, true);
    let hour = Some(Duration::from_secs(3600));
    let kept = [(90, hour), (80, None), (20, Some(Duration::from_millis(1)))];
    let kept = kept.map(|(priority, duration)| Retention { priority, duration });
    let keys = [0, 100, 200].map(|first| engine.keys(&(first..first + 4).collect::<Vec<_>>()));
    for (keys, retention) in keys.iter().zip(kept) {
        let blocks = engine.compute_kept(keys, retention);
        assert_eq!(engine.offloaded(&blocks).blocks_failed, 0);
        until("it is on disk", || on_disk(&manager, keys));
    }
    manager.stop();
    let manager = start(config);
    let found = keys.map(|keys| kept_on_disk(&manager, keys[0]).expect("it is there"));
    let left = found[0].duration.expect("it holds for a time");
    assert!(found[0].priority == 90 && left <= Duration::from_secs(3600) && left > Duration::from_secs(3000));
    assert_eq!(found[1], kept[1]);
    // A second is the least that an entry says.
    assert!(found[2].duration.is_none_or(|left| left <= Duration::from_secs(1)), "{:?}", found[2]);
    manager.stop();
}

#[test]
fn blocks_come_back_from_disk_after_a_restart() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let config = config(&[one.path(), two.path()]);
    let manager = start(config.clone());
    let keys = sink(&Engine::attach(&manager, true), 0..48);
    let counters = manager.counters();
    assert_eq!((counters.blocks(Route::HostToDisk), counters.bytes(Route::HostToDisk)), (12, 12 * STRIDE));
    manager.stop();
    manager.inspect(Ledger::check_integrity);

    let manager = start(config);
    let recovery = manager.disk().unwrap().recovery;
    assert_eq!((recovery.blocks, recovery.damaged, recovery.left_out), (12, 0, 0));
    let engine = Engine::attach(&manager, true);
    let matched = manager.match_prefix(engine.session, engine.namespace, &keys, None, &[]).unwrap();
    assert_eq!((matched.host_blocks, matched.disk_blocks), (0, 12));
    assert_eq!(fetch(&engine, &keys), 12);
    assert_eq!(manager.counters().blocks(Route::DiskToHost), 12);
    assert!(manager.counters().hit_rate(Tier::Disk) > 0.0);
    let other = engine.keys(&[9; 48]);
    assert_eq!(prefetch(&engine, &other), Prefetched { host_blocks: 0, promoting_blocks: 0 });
    manager.stop();
    manager.inspect(Ledger::check_integrity);
}

#[test]
fn everything_works_with_queues_of_length_one_and_batches_of_one() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = ManagerConfig { queue_depth: 1, batch_blocks: 1, ..config(&[directory.path()]) };
    config.disk.as_mut().unwrap().batch = BatchLimit { blocks: 1, bytes: 1 };
    let manager = start(config.clone());
    let keys = sink(&Engine::attach(&manager, true), 0..40);
    manager.stop();
    let manager = start(config);
    let engine = Engine::attach(&manager, true);
    assert_eq!(fetch(&engine, &keys), 10);
    manager.stop();
}

#[test]
fn a_flipped_bit_is_a_miss_and_its_slot_is_not_used_again() {
    let directory = tempfile::tempdir().unwrap();
    let config = config(&[directory.path()]);
    let manager = start(config.clone());
    let keys = sink(&Engine::attach(&manager, true), 0..32);
    manager.stop();
    assert_eq!(flip(directory.path(), keys[5]), 1);
    let manager = start(config);
    let engine = Engine::attach(&manager, true);
    assert_eq!(fetch(&engine, &keys), 5, "what lies before it is served");
    assert_eq!((manager.disk().unwrap().corrupt, state(&manager)), (1, DiskState::On));
    let bad: usize = manager.inspect(|ledger| ledger.disk_summaries().iter().map(|s| s.counts.bad).sum());
    assert_eq!(bad, 1);
    // Computed again, it is stored again, elsewhere.
    sink(&Engine::attach(&manager, true), 0..32);
    manager.stop();
    manager.inspect(Ledger::check_integrity);
}

#[test]
fn damage_is_found_before_anybody_asks() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = config(&[directory.path()]);
    config.disk.as_mut().unwrap().scrub_bytes_per_second = 1 << 30;
    let manager = start(config.clone());
    let keys = sink(&Engine::attach(&manager, true), 0..32);
    manager.stop();
    flip(directory.path(), keys[7]);
    let manager = start(config);
    until("it is found", || manager.disk().unwrap().corrupt == 1);
    let engine = Engine::attach(&manager, true);
    assert_eq!(fetch(&engine, &keys), 7);
    manager.stop();
}

#[test]
fn a_block_goes_to_disk_at_its_second_use() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = config(&[directory.path()]);
    config.disk.as_mut().unwrap().rules.admission.frequency_filter = true;
    let manager = start(config);
    let engine = Engine::attach(&manager, true);
    let (once, twice) = (engine.keys(&[1; 16]), engine.keys(&[2; 16]));
    for keys in [&once, &twice] {
        let blocks = engine.compute(keys);
        engine.offloaded(&blocks);
        engine.release(&blocks);
    }
    assert_eq!(fetch(&engine, &twice), 4);
    until("the second is on disk", || on_disk(&manager, &twice));
    assert!(!on_disk(&manager, &once[..1]));
    assert!(manager.inspect(|ledger| ledger.disk_turned_away().0.infrequent) >= 8);
    manager.stop();
}

#[test]
fn a_file_that_is_in_use_or_not_ours_is_refused_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let config = config(&[directory.path()]);
    let manager = start(config.clone());
    let second = Manager::start(config.clone()).unwrap_err().to_string();
    assert!(second.contains("in use by another daemon"), "{second}");
    manager.stop();
    drop(manager);
    let path = directory.path().join("kvbm-disk-cache");
    std::fs::write(&path, b"somebody's thesis").unwrap();
    let refused = Manager::start(config.clone()).unwrap_err().to_string();
    assert!(refused.contains("is not a disk cache of kvbm"), "{refused}");
    assert_eq!(std::fs::read(&path).unwrap(), b"somebody's thesis");
    let mut reset = config;
    reset.disk.as_mut().unwrap().reset = true;
    start(reset).stop();
}

#[test]
fn a_directory_that_vanishes_takes_the_tier_out_and_a_new_one_brings_it_back() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("cache");
    let manager = start(config(&[&directory]));
    let engine = Engine::attach(&manager, true);
    let keys = sink(&engine, 0..16);
    // Something that is no directory is in its place.
    std::fs::remove_dir_all(&directory).unwrap();
    std::fs::write(&directory, b"").unwrap();
    until("the tier is out", || matches!(state(&manager), DiskState::Out(_)));
    let matched = manager.match_prefix(engine.session, engine.namespace, &keys, None, &[]).unwrap();
    assert_eq!((matched.host_blocks, matched.disk_blocks), (4, 0), "host is as it was");
    std::fs::remove_file(&directory).unwrap();
    until("the tier is back", || state(&manager) == DiskState::On);
    sink(&engine, 100..116);
    manager.stop();
    manager.inspect(Ledger::check_integrity);
}

#[test]
fn a_disk_that_is_too_small_or_not_there_is_out_of_service_and_nothing_else_is() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = config(&[directory.path()]);
    config.disk.as_mut().unwrap().capacity = DiskCapacity::Bytes(1 << 55);
    let manager = Manager::start(config).unwrap();
    until("the tier is out", || matches!(state(&manager), DiskState::Out(_)));
    until("host memory is there", || manager.host_bytes().0 == manager.host_bytes().1);
    let engine = Engine::attach(&manager, true);
    let keys = engine.keys(&[3; 16]);
    assert_eq!(engine.offloaded(&engine.compute(&keys)).blocks_done, 4);
    manager.stop();
}

// ---- drives that misbehave --------------------------------------------------------------------------------------------

/// How a drive behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mood {
    Well,
    Fails(IoFailure),
    /// Takes requests and does not answer.
    Stalls,
    /// Cannot read what the first request of the next batch with reads asks for; well again after that.
    HasABadPlace,
}

/// A drive whose mood can be changed.
#[derive(Debug)]
struct Moody {
    drive: Arc<dyn DiskIo>,
    mood: Mutex<Mood>,
    stalled: Mutex<Vec<IoBatch>>,
    closed: AtomicBool,
}

impl Moody {
    fn set(&self, mood: Mood) {
        *self.mood.lock() = mood;
        if mood != Mood::Stalls {
            for batch in std::mem::take(&mut *self.stalled.lock()) {
                self.drive.submit(batch).expect("there is room");
            }
        }
    }
}

impl Moody {
    fn spoil(&self, mut batch: IoBatch) -> Result<(), IoBatch> {
        if !matches!(batch.ios[0], disk_io::Io::Read { .. }) {
            return self.drive.submit(batch);
        }
        *self.mood.lock() = Mood::Well;
        batch.ios.remove(0);
        let finished = batch.finished;
        let with_failure = move |mut results: Vec<_>| {
            results.insert(0, Err(IoFailure::Os(5)));
            finished(results);
        };
        if batch.ios.is_empty() {
            with_failure(Vec::new());
            return Ok(());
        }
        self.drive.submit(IoBatch { ios: batch.ios, finished: Box::new(with_failure) })
    }
}

impl DiskIo for Moody {
    fn submit(&self, batch: IoBatch) -> Result<(), IoBatch> {
        let mood = *self.mood.lock();
        match mood {
            Mood::Well => self.drive.submit(batch),
            Mood::Fails(failure) => {
                (batch.finished)(vec![Err(failure); batch.ios.len()]);
                Ok(())
            }
            Mood::Stalls => {
                self.stalled.lock().push(batch);
                Ok(())
            }
            Mood::HasABadPlace => self.spoil(batch),
        }
    }

    fn register(&self, memory: &Arc<SharedMemory>) {
        self.drive.register(memory);
    }

    fn abandon_waiting(&self) {
        self.drive.abandon_waiting();
    }

    fn load(&self) -> IoLoad {
        let overdue = self.stalled.lock().len();
        IoLoad { overdue, in_flight: overdue, ..self.drive.load() }
    }

    fn close(&self) {
        self.closed.store(true, Relaxed);
        self.drive.close();
    }

    fn name(&self) -> &'static str {
        "moody"
    }
}

fn start_moody(config: ManagerConfig) -> (Manager, Arc<Moody>) {
    let (manager, moody) = begin_moody(config, Mood::Well);
    serving(&manager);
    (manager, moody)
}

/// Not serving yet, and perhaps not soon.
fn begin_moody(config: ManagerConfig, mood: Mood) -> (Manager, Arc<Moody>) {
    let made = Arc::new(Mutex::new(None));
    let keep = Arc::clone(&made);
    let io = config.disk.as_ref().unwrap().io;
    let engine = move |files| {
        let drive = disk_io::start(files, io)?;
        let (mood, stalled, closed) = (Mutex::new(mood), Mutex::default(), AtomicBool::new(false));
        let moody = Arc::new(Moody { drive, mood, stalled, closed });
        *keep.lock() = Some(Arc::clone(&moody));
        Ok(moody as Arc<dyn DiskIo>)
    };
    let manager = Manager::start_with(config, None, Box::new(engine)).unwrap();
    let moody = made.lock().take().unwrap();
    (manager, moody)
}

/// What goes on while a drive misbehaves: everything but the disk.
fn host_serves(engine: &Engine, keys: &[SequenceHash]) {
    let found = engine.manager.match_prefix(engine.session, engine.namespace, keys, None, &[]).unwrap();
    assert_eq!((found.host_blocks, found.disk_blocks), (keys.len(), 0));
    engine.manager.release_lease(engine.session, found.lease.unwrap()).unwrap();
}

#[test]
fn a_drive_that_fails_or_comes_up_short_leaves_and_rejoins() {
    let short = IoFailure::Short { moved: 512, wanted: 8192 };
    for failure in [IoFailure::Os(5), short, IoFailure::TimedOut] {
        let directory = tempfile::tempdir().unwrap();
        let (manager, drive) = start_moody(config(&[directory.path()]));
        let engine = Engine::attach(&manager, true);
        let keys = sink(&engine, 0..16);
        drive.set(Mood::Fails(failure));
        let more = engine.keys(&[7; 16]);
        let blocks = engine.compute(&more);
        assert_eq!(engine.offloaded(&blocks).blocks_done, 4, "host takes them all the same");
        until("the tier is out", || matches!(state(&manager), DiskState::Out(_)));
        host_serves(&engine, &more);
        host_serves(&engine, &keys);
        drive.set(Mood::Well);
        until("the tier is back", || state(&manager) == DiskState::On);
        engine.release(&blocks);
        // A use makes them candidates again.
        assert_eq!(fetch(&engine, &more), 4);
        until("they are written now", || on_disk(&manager, &more) && on_disk(&manager, &keys));
        assert_eq!(manager.disk().unwrap().outages, 1);
        manager.stop();
        manager.inspect(Ledger::check_integrity);
        assert!(drive.closed.load(Relaxed));
    }
}

#[test]
fn a_drive_that_stalls_holds_up_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let first = start(config(&[directory.path()]));
    let keys = sink(&Engine::attach(&first, true), 0..16);
    first.stop();
    drop(first);
    let (manager, drive) = start_moody(config(&[directory.path()]));
    let engine = Engine::attach(&manager, true);
    let host = engine.keys(&[5; 16]);
    engine.release(&engine.compute(&host));
    until("it is in host", || {
        let found = manager.prefetch(engine.session, engine.namespace, &host).unwrap();
        found.host_blocks == 4
    });
    drive.set(Mood::Stalls);
    let (send, receive) = mpsc::channel();
    let done = Box::new(move |found| send.send(found).unwrap());
    manager.prefetch_and_wait(engine.session, engine.namespace, &keys, done).unwrap();
    until("the tier is out", || matches!(state(&manager), DiskState::Out(_)));
    host_serves(&engine, &host);
    let nothing = manager.match_prefix(engine.session, engine.namespace, &keys, None, &[]).unwrap();
    assert_eq!((nothing.host_blocks, nothing.disk_blocks), (0, 0));
    // Whoever waited is told, while the kernel may still write to the slots that were to be filled.
    assert_eq!(receive.recv().unwrap().host_blocks, 0);
    let filling = |manager: &Manager| manager.inspect(|ledger| ledger.host_summaries()[0].counts.filling);
    assert_eq!(filling(&manager), 4);
    drive.set(Mood::Well);
    until("the tier is back", || state(&manager) == DiskState::On);
    assert_eq!(fetch(&engine, &keys), 4);
    manager.stop();
    manager.inspect(Ledger::check_integrity);
}

/// A drive that never answers again does not keep the daemon from ending.
#[test]
fn stopping_does_not_wait_for_a_dead_drive() {
    let directory = tempfile::tempdir().unwrap();
    let (manager, drive) = start_moody(config(&[directory.path()]));
    let engine = Engine::attach(&manager, true);
    drive.set(Mood::Stalls);
    engine.offloaded(&engine.compute(&engine.keys(&[5; 16])));
    until("the tier is out", || matches!(state(&manager), DiskState::Out(_)));
    manager.stop();
    let refused = manager.match_prefix(engine.session, engine.namespace, &engine.keys(&[5; 4]), None, &[]);
    assert!(!matches!(refused, Err(Refused::Closed)), "what is known can still be asked");
    drive.set(Mood::Well);
}

/// A bad place is not a bad drive: only what lay there is lost.
#[test]
fn a_place_that_cannot_be_read_is_a_miss_and_the_tier_stays() {
    let directory = tempfile::tempdir().unwrap();
    let first = start(config(&[directory.path()]));
    let keys = sink(&Engine::attach(&first, true), 0..32);
    first.stop();
    drop(first);
    let (manager, drive) = start_moody(config(&[directory.path()]));
    let engine = Engine::attach(&manager, true);
    drive.set(Mood::HasABadPlace);
    assert!(fetch(&engine, &keys) < 8);
    let figures = manager.disk().unwrap();
    assert_eq!((figures.state, figures.outages, figures.corrupt), (DiskState::On, 0, 1));
    // Computed again, it is stored again, elsewhere.
    sink(&Engine::attach(&manager, true), 0..32);
    manager.stop();
    manager.inspect(Ledger::check_integrity);
}

#[test]
fn having_nothing_to_read_says_nothing_about_a_drive() {
    let directory = tempfile::tempdir().unwrap();
    let (manager, _drive) = start_moody(config(&[directory.path()]));
    let tier = manager.shared.disk.as_ref().unwrap();
    let store = tier.store().unwrap();
    (0..10).for_each(|_| assert!(manager.shared.judge(tier, &store, &[], &[]).is_empty()));
    assert_eq!(tier.reads_in_vain.load(Relaxed), 0);
    drop(store);
    manager.stop();
}

/// Tables that cannot be read now are not an empty cache.
#[test]
fn what_cannot_be_read_at_the_start_is_found_when_the_drive_answers() {
    let directory = tempfile::tempdir().unwrap();
    let first = start(config(&[directory.path()]));
    let keys = sink(&Engine::attach(&first, true), 0..32);
    first.stop();
    drop(first);
    // Each attempt has an engine of its own: those after the first are well.
    let attempts = AtomicU32::new(0);
    let io = config(&[directory.path()]).disk.unwrap().io;
    let engine = move |files| {
        let drive = disk_io::start(files, io)?;
        let broken = attempts.fetch_add(1, Relaxed) == 0;
        let mood = Mutex::new(if broken { Mood::HasABadPlace } else { Mood::Well });
        let (stalled, closed) = (Mutex::default(), AtomicBool::new(false));
        Ok(Arc::new(Moody { drive, mood, stalled, closed }) as Arc<dyn DiskIo>)
    };
    let manager = Manager::start_with(config(&[directory.path()]), None, Box::new(engine)).unwrap();
    until("the tier serves", || state(&manager) == DiskState::On);
    let figures = manager.disk().unwrap();
    assert_eq!((figures.recovery.blocks, figures.recovery.unreadable, figures.outages), (8, 0, 1));
    until("host memory is there", || manager.host_bytes().0 == manager.host_bytes().1);
    assert_eq!(fetch(&Engine::attach(&manager, true), &keys), 8);
    manager.stop();
}

#[test]
fn stopping_does_not_wait_for_a_drive_that_stalls_at_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = config(&[directory.path()]);
    // It is not noticed before the end.
    config.disk.as_mut().unwrap().io.deadline = Duration::from_secs(3600);
    let (manager, drive) = start_moody(config);
    sink(&Engine::attach(&manager, true), 0..16);
    *drive.mood.lock() = Mood::Stalls;
    manager.stop();
    drive.set(Mood::Well);
}
