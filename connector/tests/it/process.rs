//! A daemon in a process of its own, killed in the middle of an onboard.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kvbm_connector::{CacheEvent, CacheState, Config};

use crate::engine::{Engine, keys, patient};
use crate::mock::{Hold, Mock, wait_for};

const SOCKET: &str = "KVBM_TEST_MOCK_SOCKET";
const SIGSTOP: &str = "-STOP";

/// Not a test of its own: what the child process runs.
#[test]
fn child_daemon() {
    let Some(socket) = std::env::var_os(SOCKET) else { return };
    let mock = Mock::start(Path::new(&socket));
    mock.hold(Hold { onboards: true, ..Hold::default() });
    mock.state.lock().host.extend(keys(2).iter().map(|key| key.0.to_vec()));
    println!("READY");
    // Ends with its parent, whose end of the pipe closes.
    let _ = std::io::stdin().read_line(&mut String::new());
}

struct Daemon(Child);

impl Daemon {
    fn start(socket: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "process::child_daemon", "--nocapture"])
            .env(SOCKET, socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.map_while(Result::ok).any(|line| line.contains("READY")));
        Self(child)
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn onboarding(config: Config) -> (Engine, Vec<u32>) {
    let mut engine = Engine::start(config, 8);
    let (_, host_blocks, lease) = engine.look(1, 2);
    assert_eq!(host_blocks, 2);
    let targets = engine.allocate(2);
    engine.cache.onboard(9, lease.unwrap(), targets.clone());
    (engine, targets)
}

#[test]
fn a_killed_daemon_leaves_no_quarantine() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("kvbm.sock");
    let mut daemon = Daemon::start(&socket);
    let (mut engine, _) = onboarding(patient(&socket));
    daemon.kill();
    assert!(!engine.onboarded(9));
    wait_for("the kernel's word", || {
        engine.cache.poll();
        (engine.cache.counters().quarantined_blocks.get() == 0).then_some(())
    });
    assert_eq!(engine.cache.state(), CacheState::Detached);
    assert_eq!(engine.allocate(8).len(), 8);
}

#[test]
fn a_stopped_daemon_keeps_its_targets_until_it_is_dead_even_while_another_serves() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("kvbm.sock");
    let mut stopped = Daemon::start(&socket);
    let config = Config {
        detach_after: Duration::from_millis(800),
        attach_deadline: Duration::from_secs(1),
        ..patient(&socket)
    };
    let (mut engine, targets) = onboarding(config);
    let stop = Command::new("kill").args([SIGSTOP, &stopped.0.id().to_string()]).status().unwrap();
    assert!(stop.success());
    assert!(!engine.onboarded(9));
    assert_eq!(engine.cache.counters().quarantined_blocks.get(), 2);

    // Somebody starts another daemon in its place.
    std::fs::remove_file(&socket).unwrap();
    std::fs::remove_file(socket.with_extension("sock.fd")).unwrap();
    let mock = Mock::start(&socket);
    engine.until("the other daemon", |event| matches!(event, CacheEvent::Attached { .. }).then_some(()));
    assert_eq!(engine.cache.counters().quarantined_blocks.get(), 2);
    let held: Vec<u32> = mock.state.lock().adoptions[0].held.iter().map(|block| block.block).collect();
    assert!(targets.iter().all(|target| held.contains(target)), "the other daemon must not hand them out");

    stopped.kill();
    wait_for("the kernel's word", || {
        engine.cache.poll();
        (engine.cache.counters().quarantined_blocks.get() == 0).then_some(())
    });
    let mut all = engine.allocate(8);
    all.sort_unstable();
    assert_eq!(all, (0..8).collect::<Vec<u32>>());
}
