//! One process under test. It does not outlive the test.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal};

use crate::wait::{eventually, eventually_within};

/// The binary under test: `KVBM_TEST_PROGRAM`, or the one beside the test's own.
pub fn program() -> PathBuf {
    if let Some(program) = std::env::var_os("KVBM_TEST_PROGRAM") {
        return program.into();
    }
    let own = std::env::current_exe().unwrap();
    let path = own.ancestors().nth(2).unwrap().join("kvbm");
    assert!(path.is_file(), "{} is missing: build it first, as `make test` does", path.display());
    path
}

/// See the module.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    ready: PathBuf,
}

impl Process {
    /// Starts `kvbm` with these arguments; logs go to a file in `dir`.
    pub fn start(dir: &Path, name: &str, arguments: &[String], environment: &[(String, String)]) -> Self {
        let log = dir.join(format!("{name}.log"));
        let ready = dir.join(format!("{name}.ready"));
        let _ = std::fs::remove_file(&ready);
        let file = File::options().create(true).append(true).open(&log).unwrap();
        let child = Command::new(program())
            .args(arguments)
            .arg("--ready-file")
            .arg(&ready)
            .env("KVBM_PARENT_PID", std::process::id().to_string())
            .env("DYN_LOG", std::env::var("DYN_LOG").unwrap_or_else(|_| "info".into()))
            .envs(environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::from(file.try_clone().unwrap()))
            .stderr(Stdio::from(file))
            .spawn()
            .unwrap();
        Self { name: name.into(), child, log, ready }
    }

    /// Waits until it serves; returns what it said.
    pub fn wait_ready(&mut self) -> serde_json::Value {
        eventually_within(Duration::from_secs(60), &format!("{} serves", self.name), || {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("{} ended with {status}:\n{}", self.name, self.log());
            }
            serde_json::from_slice(&std::fs::read(&self.ready).ok()?).ok()
        })
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything it logged, its predecessors of the same name included.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// True while it runs.
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Sends a signal; of one that stops, returns when all threads have.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id() as i32).unwrap();
        let _ = rustix::process::kill_process(pid, signal);
        if signal == Signal::STOP {
            let tasks = PathBuf::from(format!("/proc/{}/task", self.child.id()));
            eventually("it has stopped", || are_stopped(&tasks).then_some(()));
        }
    }

    /// Ends it at once, and waits for that.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.child.wait().unwrap();
    }

    /// Asks it to end, and waits for that.
    pub fn terminate(&mut self) -> std::process::ExitStatus {
        self.signal(Signal::TERM);
        eventually_within(Duration::from_secs(30), &format!("{} ends", self.name), || {
            self.child.try_wait().unwrap()
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            eprintln!("--- {} ---", self.name);
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
}

/// Whether no thread runs any more. The state follows the name, which is in parentheses and may have some itself.
fn are_stopped(tasks: &Path) -> bool {
    let mut states = std::fs::read_dir(tasks).into_iter().flatten().flatten().map(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit(") ").next().and_then(|rest| rest.chars().next())
    });
    states.all(|state| matches!(state, None | Some('T' | 't' | 'Z' | 'X')))
}
