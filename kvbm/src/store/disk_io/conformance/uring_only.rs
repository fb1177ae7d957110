//! What only a ring does: cancelling, and registering where the kernel permits it.

use std::fmt;
use std::process::Command;
use std::sync::Mutex;

use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use tracing::field::{Field, Visit};
use tracing::span;

use super::super::{IoFailure, IoKind, start};
use super::*;

const PAGE: usize = 4096;

fn uring(files: Vec<File>, options: IoOptions) -> Option<Arc<dyn DiskIo>> {
    Subject::Uring.is_there().then(|| Subject::Uring.start(files, options))
}

/// Registering is done before any I/O that was handed in after it.
fn registered(engine: &Arc<dyn DiskIo>) -> usize {
    assert_eq!(carry_out_all(engine, vec![]), []);
    engine.memories_registered()
}

/// Writes and reads through this memory, and compares.
fn moves_bytes(engine: &Arc<dyn DiskIo>, memory: &Arc<SharedMemory>, seed: u8) {
    memory.write(0, &[seed; PAGE]);
    memory.write(PAGE, &[0; PAGE]);
    assert_eq!(carry_out_all(engine, vec![write(0, 0, memory, 0, PAGE)]), [Ok(())]);
    assert_eq!(carry_out_all(engine, vec![read(0, 0, memory, PAGE, PAGE)]), [Ok(())]);
    let mut seen = [0; PAGE];
    memory.read(PAGE, &mut seen);
    assert_eq!(seen, [seed; PAGE]);
}

#[test]
fn an_overdue_io_is_cancelled_and_timed_out() {
    let (pipe, _stall) = Stall::new();
    let (file, _) = open(false);
    let options = IoOptions { deadline: Duration::from_millis(20), ..IoOptions::default() };
    let Some(engine) = uring(vec![pipe, file], options) else { return };
    let memory = memory(2 * PAGE);
    let ios = vec![read(0, 0, &memory, 0, PAGE), write(1, 0, &memory, PAGE, PAGE)];
    assert_eq!(carry_out_all(&engine, ios), [Err(IoFailure::TimedOut), Ok(())]);
    assert_eq!(engine.load(), super::super::IoLoad::default());
}

#[test]
fn more_memories_than_there_is_room_for_work_all_the_same() {
    let options = IoOptions { memories_registered_max: 2, ..patient() };
    let Some(engine) = uring(vec![open(true).0], options) else { return };
    let memories = [(); 5].map(|()| memory(2 * PAGE));
    for memory in &memories {
        engine.register(memory);
        assert!(registered(&engine) <= 2);
    }
    // All at once, and again, changes nothing.
    memories.iter().for_each(|memory| engine.register(memory));
    assert_eq!(registered(&engine), 2);
    for (memory, seed) in memories.iter().zip(1..) {
        moves_bytes(&engine, memory, seed);
    }
}

#[test]
fn a_memory_that_is_gone_makes_room_and_is_never_taken_for_another() {
    let options = IoOptions { memories_registered_max: 1, ..patient() };
    let Some(engine) = uring(vec![open(true).0], options) else { return };
    for seed in 1..20 {
        // The allocator likes to give the same address again.
        let memory = memory(2 * PAGE);
        moves_bytes(&engine, &memory, seed);
        engine.register(&memory);
        assert_eq!(registered(&engine), 1);
        moves_bytes(&engine, &memory, seed + 100);
    }
}

#[test]
fn the_best_engine_is_chosen_and_names_itself() {
    let there = Subject::Uring.is_there();
    let named = |kind| start(vec![], IoOptions { kind, ..patient() }).map(|engine| engine.name());
    assert_eq!(named(IoKind::Auto).unwrap(), if there { "io_uring" } else { "pread" });
    assert_eq!(named(IoKind::Pread).unwrap(), "pread");
    assert_eq!(named(IoKind::Uring).is_ok(), there);
}

#[test]
fn what_the_kernel_gives_no_ring_for_is_done_with_threads() {
    // No ring is this long.
    let named = |kind| {
        start(vec![open(true).0], IoOptions { kind, depth: 100_000, ..patient() }).map(|engine| {
            moves_bytes(&engine, &memory(2 * PAGE), 1);
            engine.name()
        })
    };
    assert!(named(IoKind::Uring).is_err());
    assert_eq!(named(IoKind::Auto).unwrap(), "pread");
}

const CHILD: &str = "KVBM_TEST_CHILD";
const MEMORY: usize = 1 << 20;

/// Limits are those of a process, so this test is two.
#[test]
fn where_registering_is_forbidden_it_works_without_and_says_so_once() {
    let name = concat!(module_path!(), "::where_registering_is_forbidden_it_works_without_and_says_so_once");
    if std::env::var_os(CHILD).is_some() {
        return under_limits();
    }
    if !Subject::Uring.is_there() {
        return;
    }
    let name = name.split_once("::").unwrap().1;
    let mut child = Command::new(std::env::current_exe().unwrap());
    let output = child.args(["--exact", name, "--nocapture"]).env(CHILD, "1").output().unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

fn under_limits() {
    tracing::subscriber::set_global_default(Lines).unwrap();
    // More files than a process may have, yet room for the few that the engine needs itself.
    let (file, _) = open(true);
    let mut files: Vec<File> = (0..80).map(|_| file.try_clone().unwrap()).collect();
    files.drain(..10);
    setrlimit(Resource::Nofile, Rlimit { current: Some(40), maximum: Some(40) }).unwrap();
    // Newer kernels count the ring as well; it needs less than that, and each memory more.
    let locked = Some(MEMORY as u64 / 2);
    setrlimit(Resource::Memlock, Rlimit { current: locked, maximum: locked }).unwrap();
    // The engine's thread has no more rights than this one.
    let mut rights = capabilities(None).unwrap();
    rights.effective.remove(CapabilitySet::IPC_LOCK);
    set_capabilities(None, rights).unwrap();

    let engine = Subject::Uring.start(files, patient());
    let files_only = LINES.lock().unwrap().clone();
    assert!(matches!(&files_only[..], [line] if line.contains("files are not registered")), "{files_only:?}");
    let memories = [(); 3].map(|()| memory(MEMORY));
    memories.iter().for_each(|memory| engine.register(memory));
    assert_eq!(registered(&engine), 0);
    for (memory, seed) in memories.iter().zip(1..) {
        moves_bytes(&engine, memory, seed);
    }
    engine.close();
    let lines = LINES.lock().unwrap().clone();
    assert_eq!(lines.iter().filter(|line| line.contains("memory is not registered")).count(), 1, "{lines:?}");
    assert_eq!(lines.len(), 2, "{lines:?}");
}

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Keeps the text of every event.
struct Lines;

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.push_str(&format!("{}={value:?} ", field.name()));
    }
}

impl tracing::Subscriber for Lines {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        LINES.lock().unwrap().push(text.0);
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}
