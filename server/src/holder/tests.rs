use std::future::Future;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use kvbm_shm::{SharedMemory, SideListener, SideSocket};
use rustix::event::{PollFd, PollFlags};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::message::{Label, Refusal, Reply, Request, VERSION};
use super::*;

const LONG: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(30);

/// A holder that runs only while the test waits in [`Rig::run`] or [`Rig::call`]: in between it is frozen.
struct Rig {
    runtime: Runtime,
    holder: JoinHandle<Result<Ended, HolderError>>,
    cancel: CancellationToken,
    path: PathBuf,
    _dir: TempDir,
}

impl Rig {
    fn new() -> Self {
        Self::with_grace(LONG)
    }

    fn with_grace(grace: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k.sock.hold");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let cancel = CancellationToken::new();
        let holder = Holder::bind(&path).unwrap();
        assert!(holder.capacity() > 16);
        let holder = runtime.spawn(holder.serve(grace, cancel.clone()));
        Self { runtime, holder, cancel, path, _dir: dir }
    }

    fn run<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(async { tokio::time::timeout(SOON, work).await.expect("it takes too long") })
    }

    /// Runs blocking work beside the holder.
    fn call<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        self.run(async { tokio::task::spawn_blocking(work).await.unwrap() })
    }

    fn connect(&self) -> (Client, Vec<HeldSegment>) {
        self.try_connect(SOON).unwrap()
    }

    fn try_connect(&self, limit: Duration) -> Result<(Client, Vec<HeldSegment>), HolderError> {
        let path = self.path.clone();
        self.call(move || Client::connect_within(&path, limit))
    }

    /// A connection that may say what it likes.
    fn raw(&self) -> SideSocket {
        SideSocket::connect(&self.path).unwrap()
    }

    /// The next reply on it, `None` at its end.
    fn reply(&self, socket: &SideSocket) -> Option<Reply> {
        let socket = socket.try_clone().unwrap();
        self.call(move || {
            assert!(socket.wait_readable(SOON).unwrap());
            match socket.receive_fds() {
                Ok(packet) => packet.map(|(bytes, fds)| Reply::decode(&bytes, &fds).unwrap()),
                // It was closed before everything that was sent to it was read.
                Err(error) => {
                    assert!(super::error::is_closed(&error), "{error}");
                    None
                }
            }
        })
    }

    fn ended(&mut self) -> Ended {
        let holder = &mut self.holder;
        self.runtime.block_on(async { tokio::time::timeout(SOON, holder).await }).unwrap().unwrap().unwrap()
    }
}

struct Segment {
    memory: SharedMemory,
    table: SharedMemory,
}

impl Segment {
    fn new(text: &[u8]) -> Self {
        let segment = Self {
            memory: SharedMemory::create("memory", 4096).unwrap(),
            table: SharedMemory::create("table", 8192).unwrap(),
        };
        segment.memory.write(0, text);
        segment.table.write(0, b"table");
        segment
    }

    fn keep(&self, client: &Client, index: u32) {
        client.keep(index, [index as u8; 32], self.memory.fd(), self.table.fd()).unwrap();
    }
}

/// Index and fingerprint of each, and the first `N` bytes of its memory.
fn contents<const N: usize>(held: Vec<HeldSegment>) -> Vec<(u32, [u8; 32], [u8; N])> {
    let content = |segment: HeldSegment| {
        let table = SharedMemory::from_fd(segment.table).unwrap();
        let mut text = [0; 5];
        table.read(0, &mut text);
        assert_eq!((table.bytes(), &text), (8192, b"table"));
        let mut bytes = [0; N];
        SharedMemory::from_fd(segment.memory).unwrap().read(0, &mut bytes);
        (segment.index, segment.fingerprint, bytes)
    };
    held.into_iter().map(content).collect()
}

fn indexes(held: &[HeldSegment]) -> Vec<u32> {
    held.iter().map(|segment| segment.index).collect()
}

#[test]
fn the_next_connection_finds_the_same_memory() {
    let rig = Rig::new();
    let (client, held) = rig.connect();
    assert!(held.is_empty());
    let segments = [Segment::new(b"first"), Segment::new(b"other"), Segment::new(b"third")];
    for (segment, index) in segments.iter().zip([7, 1, 4]) {
        segment.keep(&client, index);
    }
    drop(client);
    // Written through the old mapping after it was handed over, read through the new one.
    segments[1].memory.write(0, b"again");
    let (_client, held) = rig.connect();
    let expected = [(1, [1; 32], *b"again"), (4, [4; 32], *b"third"), (7, [7; 32], *b"first")];
    assert_eq!(contents(held), expected);
}

#[test]
fn what_is_dropped_or_replaced_is_not_found_again() {
    let rig = Rig::new();
    let (client, _) = rig.connect();
    for index in 0..4 {
        Segment::new(b"older").keep(&client, index);
    }
    Segment::new(b"newer").keep(&client, 2);
    client.drop_segment(0).unwrap();
    client.drop_segment(99).unwrap();
    drop(client);
    let (client, held) = rig.connect();
    let found: Vec<_> = contents(held).into_iter().map(|(index, _, text)| (index, text)).collect();
    assert_eq!(found, [(1, *b"older"), (2, *b"newer"), (3, *b"older")]);
    client.drop_all().unwrap();
    Segment::new(b"alone").keep(&client, 9);
    drop(client);
    assert_eq!(indexes(&rig.connect().1), [9]);
}

#[test]
fn last_words_are_heard_before_the_next_daemon_is() {
    let rig = Rig::new();
    let (client, _) = rig.connect();
    // The holder is frozen from here: end of file and the newcomer are there before it has read a single packet.
    for index in 0..20 {
        Segment::new(b"words").keep(&client, index);
    }
    drop(client);
    let newcomer = rig.raw();
    newcomer.send(&Request::Hello { version: VERSION }.encode(), None).unwrap();
    let welcome = rig.reply(&newcomer).unwrap();
    assert!(matches!(welcome, Reply::Welcome { count: 20, .. }), "{welcome:?}");
}

#[test]
fn a_second_daemon_is_told_that_the_holder_is_busy() {
    let rig = Rig::new();
    let (client, _) = rig.connect();
    Segment::new(b"first").keep(&client, 3);
    let busy = rig.try_connect(Duration::from_millis(500)).unwrap_err();
    assert!(matches!(busy, HolderError::Busy { pid } if pid == std::process::id()), "{busy}");
    // It can also wait for its turn.
    let path = rig.path.clone();
    let second = rig.runtime.spawn_blocking(move || Client::connect_within(&path, SOON));
    drop(client);
    let (_client, held) = rig.run(second).unwrap().unwrap();
    assert_eq!(indexes(&held), [3]);
}

#[test]
fn a_second_holder_is_refused_and_the_socket_of_a_dead_one_replaced() {
    let mut rig = Rig::new();
    let error = Holder::bind(&rig.path).unwrap_err();
    let pid = std::process::id();
    assert!(matches!(error, HolderError::InUse { pid: Some(of), .. } if of == pid), "{error}");
    rig.cancel.cancel();
    assert_eq!(rig.ended(), Ended::Told);
    assert!(!rig.path.exists(), "its socket is removed");
    // What kill -9 leaves: a socket that nobody listens at.
    drop(UnixListener::bind(&rig.path).unwrap());
    assert!(rig.path.exists());
    drop(Holder::bind(&rig.path).unwrap());
    std::fs::write(&rig.path, "precious").unwrap();
    let error = Holder::bind(&rig.path).unwrap_err();
    assert!(matches!(error, HolderError::NotASocket { .. }), "{error}");
    assert_eq!(std::fs::read_to_string(&rig.path).unwrap(), "precious");
}

#[test]
fn the_socket_of_a_program_without_our_lock_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    for (name, side) in [("stream", false), ("side", true)] {
        let path = dir.path().join(name);
        let _stream = (!side).then(|| UnixListener::bind(&path).unwrap());
        let _side = side.then(|| SideListener::bind(&path).unwrap());
        let error = Holder::bind(&path).unwrap_err();
        assert!(matches!(error, HolderError::InUse { pid: None, .. }), "{name}: {error}");
        assert!(path.exists());
    }
}

#[test]
fn it_ends_when_no_daemon_comes() {
    let mut rig = Rig::with_grace(Duration::from_millis(30));
    assert_eq!(rig.ended(), Ended::Alone);
    assert!(!rig.path.exists());
    let gone = Client::connect_within(&rig.path, Duration::from_millis(30)).unwrap_err();
    assert!(matches!(gone, HolderError::Unavailable { .. }), "{gone}");
}

#[test]
fn a_daemon_keeps_it_alive_and_the_grace_begins_when_it_leaves() {
    let mut rig = Rig::with_grace(Duration::from_millis(600));
    let (client, _) = rig.connect();
    let holder = &mut rig.holder;
    let early =
        rig.runtime.block_on(async { tokio::time::timeout(Duration::from_millis(1500), holder).await });
    assert!(early.is_err(), "{early:?}");
    drop(client);
    let left = std::time::Instant::now();
    assert_eq!(rig.ended(), Ended::Alone);
    assert!(left.elapsed() >= Duration::from_millis(600));
}

#[test]
fn a_wrong_packet_ends_the_connection_and_nothing_else() {
    let rig = Rig::new();
    let (client, _) = rig.connect();
    let segment = Segment::new(b"first");
    segment.keep(&client, 5);
    drop(client);
    let keep = Request::Keep(Label { index: 6, fingerprint: [0; 32] }).encode();
    let fds = [segment.memory.fd(), segment.table.fd()];
    let cases: [(&[u8], usize); 6] = [
        (b"?", 0),
        (&keep[..10], 2),
        (&keep, 1),
        (&keep, 0),
        (&[b'X'; 300], 0),
        (&Request::Hello { version: VERSION }.encode(), 0),
    ];
    for (bytes, count) in cases {
        let socket = rig.raw();
        socket.send(&Request::Hello { version: VERSION }.encode(), None).unwrap();
        let welcome = rig.reply(&socket).unwrap();
        assert!(matches!(welcome, Reply::Welcome { count: 1, .. }), "{welcome:?}");
        assert!(matches!(rig.reply(&socket), Some(Reply::Held(Label { index: 5, .. }))));
        assert_eq!(rig.reply(&socket), Some(Reply::Done));
        socket.send_fds(bytes, &fds[..count]).unwrap();
        // A Keep behind it is not heard.
        socket.send_fds(&keep, &fds).unwrap();
        assert_eq!(rig.reply(&socket), None, "{bytes:?} with {count} descriptors");
    }
    assert_eq!(contents(rig.connect().1), [(5, [5; 32], *b"first")]);
}

#[test]
fn a_newcomer_that_is_silent_or_says_something_else_is_sent_away() {
    let rig = Rig::new();
    let silent = rig.raw();
    assert_eq!(rig.reply(&silent), None);
    let rude = rig.raw();
    rude.send(&Request::DropAll.encode(), None).unwrap();
    assert_eq!(rig.reply(&rude), None);
    rig.connect();
}

#[test]
fn another_version_is_refused_by_both_sides() {
    let rig = Rig::new();
    let socket = rig.raw();
    socket.send(&[&Request::Hello { version: 2 }.encode()[..], b"news"].concat(), None).unwrap();
    let refused = Reply::Refused { version: VERSION, refusal: Refusal::Version };
    assert_eq!(rig.reply(&socket), Some(refused));
    assert_eq!(rig.reply(&socket), None);

    for reply in [Reply::Refused { version: 2, refusal: Refusal::Version }, welcome(2, 0)] {
        let error = connect_to(vec![reply.encode()], SOON).unwrap_err();
        assert!(matches!(error, HolderError::Version { theirs: 2 }), "{error}");
    }
}

fn welcome(version: u32, count: u32) -> Reply {
    Reply::Welcome { version, count, capacity: 8 }
}

/// Connects to something that answers a Hello with these packets.
fn connect_to(packets: Vec<Vec<u8>>, limit: Duration) -> Result<(Client, Vec<HeldSegment>), HolderError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hold");
    let listener = SideListener::bind(&path).unwrap();
    let connecting = {
        let path = path.clone();
        std::thread::spawn(move || Client::connect_within(&path, limit))
    };
    rustix::event::poll(&mut [PollFd::new(&listener, PollFlags::IN)], None).unwrap();
    let socket = listener.accept().unwrap();
    assert!(socket.wait_readable(SOON).unwrap());
    assert_eq!(socket.receive().unwrap().unwrap().bytes, Request::Hello { version: VERSION }.encode());
    for packet in packets {
        socket.send(&packet, None).unwrap();
    }
    connecting.join().unwrap()
}

#[test]
fn a_holder_that_is_slow_or_wrong_is_an_error_of_the_daemons_start() {
    let late = connect_to(vec![], Duration::from_millis(200)).unwrap_err();
    assert!(matches!(late, HolderError::Late { .. }), "{late}");
    let late = connect_to(vec![welcome(VERSION, 0).encode()], Duration::from_millis(200)).unwrap_err();
    assert!(matches!(late, HolderError::Late { .. }), "{late}");
    let many = connect_to(vec![welcome(VERSION, u32::MAX).encode()], SOON).unwrap_err();
    assert!(matches!(many, HolderError::Descriptors { .. }), "{many}");
    for replies in [
        vec![Reply::Done],
        vec![welcome(VERSION, 1), Reply::Done],
        vec![welcome(VERSION, 0), welcome(VERSION, 0)],
        vec![Reply::Held(Label { index: 0, fingerprint: [0; 32] })],
    ] {
        let error = connect_to(replies.iter().map(|reply| reply.encode()).collect(), SOON).unwrap_err();
        assert!(matches!(error, HolderError::Malformed(_)), "{replies:?}: {error}");
    }
}

#[test]
fn a_full_holder_says_so_and_keeps_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hold");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let holder = Holder::bind(&path).unwrap().with_capacity(2);
    runtime.spawn(holder.serve(LONG, CancellationToken::new()));
    let (client, _) = Client::connect_within(&path, SOON).unwrap();
    let segment = Segment::new(b"first");
    assert_eq!(client.capacity(), 2);
    segment.keep(&client, 0);
    segment.keep(&client, 1);
    let full = client.keep(2, [2; 32], segment.memory.fd(), segment.table.fd()).unwrap_err();
    assert!(matches!(full, HolderError::Full { capacity: 2 }), "{full}");
    segment.keep(&client, 1);
    client.drop_segment(0).unwrap();
    segment.keep(&client, 2);
    drop(client);
    // A client that does not count is cut off.
    let socket = SideSocket::connect(&path).unwrap();
    socket.send(&Request::Hello { version: VERSION }.encode(), None).unwrap();
    let keep = Request::Keep(Label { index: 3, fingerprint: [0; 32] }).encode();
    socket.send_fds(&keep, &[segment.memory.fd(), segment.table.fd()]).unwrap();
    let mut received = 0;
    while socket.wait_readable(SOON).unwrap() && socket.receive_fds().unwrap().is_some() {
        received += 1;
    }
    assert_eq!(received, 4, "Welcome, two segments, Done");
    assert_eq!(indexes(&Client::connect_within(&path, SOON).unwrap().1), [1, 2]);
}

#[test]
fn a_holder_that_dies_is_noticed_and_costs_nothing_but_an_error() {
    let mut rig = Rig::new();
    let (client, _) = rig.connect();
    let client = Arc::new(client);
    let watching = {
        let client = Arc::clone(&client);
        rig.runtime.spawn(async move { client.watch().await })
    };
    rig.cancel.cancel();
    assert_eq!(rig.ended(), Ended::Told);
    rig.run(watching).unwrap();
    let segment = Segment::new(b"first");
    for _ in 0..2 {
        let lost = client.keep(0, [0; 32], segment.memory.fd(), segment.table.fd()).unwrap_err();
        assert!(matches!(lost, HolderError::Lost), "{lost}");
    }
}

#[test]
fn a_holder_that_stops_reading_is_given_up_after_a_while() {
    let rig = Rig::new();
    let (client, _) = rig.connect();
    let segment = Segment::new(b"first");
    // The holder is frozen, so the socket fills up.
    let error = std::iter::repeat_with(|| client.keep(0, [0; 32], segment.memory.fd(), segment.table.fd()))
        .find_map(Result::err)
        .unwrap();
    assert!(matches!(error, HolderError::Late { .. }), "{error}");
    let again = client.drop_all().unwrap_err();
    assert!(matches!(again, HolderError::Lost), "{again}");
    drop(client);
    assert_eq!(indexes(&rig.connect().1), [0], "what went through before is kept");
}

#[test]
fn hundreds_of_segments_come_back() {
    let rig = Rig::new();
    let (client, _) = rig.connect();
    let segment = Segment::new(b"first");
    let client = rig.call(move || {
        (0..300).for_each(|index| segment.keep(&client, index));
        client
    });
    drop(client);
    let (_client, held) = rig.connect();
    assert!(indexes(&held).into_iter().eq(0..300));
}

#[test]
fn only_processes_of_the_holders_user_are_served() {
    let rig = Rig::new();
    if !rustix::process::geteuid().is_root() {
        eprintln!("not tested: only root can be another user");
        return;
    }
    let path = rig.path.clone();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o600);
    // Lets the stranger as far as the check that counts.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
    std::fs::set_permissions(path.parent().unwrap(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let nobody = || {
        let uid = rustix::process::Uid::from_raw(65_534);
        // Of this thread only.
        rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
    };
    let refused = {
        let path = path.clone();
        rig.call(move || {
            // A thread that ends: the one that waits here is used again.
            let stranger = std::thread::spawn(move || {
                nobody();
                let socket = SideSocket::connect(&path).unwrap();
                socket.send(&Request::Hello { version: VERSION }.encode(), None).unwrap();
                assert!(socket.wait_readable(SOON).unwrap());
                let (bytes, fds) = socket.receive_fds().unwrap().unwrap();
                Reply::decode(&bytes, &fds).unwrap()
            });
            stranger.join().unwrap()
        })
    };
    assert_eq!(refused, Reply::Refused { version: VERSION, refusal: Refusal::User });
    // And a daemon does not take memory from a stranger.
    let client = std::thread::spawn(move || {
        nobody();
        Client::connect_within(&path, SOON)
    });
    let error = client.join().unwrap().unwrap_err();
    assert!(matches!(error, HolderError::Stranger { uid: 0 }), "{error}");
    rig.connect();
}

const CHILD: &str = "KVBM_TEST_HOLDER";

/// Not a test of its own: the process that the next one kills.
#[test]
fn process_that_keeps_one_segment() {
    let Some(path) = std::env::var_os(CHILD) else { return };
    let (client, held) = Client::connect_within(Path::new(&path), SOON).unwrap();
    assert!(held.is_empty());
    let segment = Segment::new(b"alive");
    segment.keep(&client, 0);
    println!("\nkept");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    drop(client);
    println!("\nleft");
    std::io::stdin().read_line(&mut line).unwrap();
}

fn wait_for(child: &mut BufReader<std::process::ChildStdout>, word: &str) {
    let mut line = String::new();
    while line.trim() != word {
        line.clear();
        assert_ne!(child.read_line(&mut line).unwrap(), 0, "it ended before it said {word}");
    }
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn memory_of_a_killed_process_is_found_but_not_before_it_is_dead() {
    let rig = Rig::new();
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "holder::tests::process_that_keeps_one_segment", "--nocapture"])
        .env(CHILD, &rig.path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut child = Killed(child);
    let pid = child.0.id();
    let mut output = BufReader::new(child.0.stdout.take().unwrap());
    let mut output = rig.call(move || {
        wait_for(&mut output, "kept");
        output
    });
    for said in ["it is connected", "it has hung up but lives"] {
        let socket = rig.raw();
        socket.send(&Request::Hello { version: VERSION }.encode(), None).unwrap();
        assert_eq!(rig.reply(&socket), Some(Reply::Busy { pid }), "{said}");
        if said == "it is connected" {
            writeln!(child.0.stdin.as_ref().unwrap()).unwrap();
            output = rig.call(move || {
                wait_for(&mut output, "left");
                output
            });
        }
    }
    child.0.kill().unwrap();
    // Not even waited for: the holder learns of the death from the kernel.
    let (_client, held) = rig.connect();
    assert_eq!(contents(held), [(0, [0; 32], *b"alive")]);
}
