//! One part that `kvbm up` keeps running: a child process of the same binary.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::{Child, Command};

use super::LOOK;
use crate::parent::PARENT_PID;
use crate::ready::Ready;

/// First pause before a part is started again; it doubles up to `BACKOFF_MAX`.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// A part that ran this long starts with the first pause again.
const HEALTHY: Duration = Duration::from_secs(30);

/// See the module.
#[derive(Debug)]
pub(super) struct Part {
    /// As people call it: `daemon`, `worker 1`, `frontend`.
    pub name: String,
    arguments: Vec<String>,
    ready_file: PathBuf,
    child: Option<Child>,
    started: Instant,
    backoff: Duration,
    /// When it is to be started again.
    pub due: Option<Instant>,
}

impl Part {
    /// Runs `kvbm SUBCOMMAND`.
    pub fn new(name: String, subcommand: &str, run_dir: &Path) -> Self {
        let arguments = vec![subcommand.to_owned()];
        let ready_file = run_dir.join(format!("{}.json", name.replace(' ', "-")));
        let (child, started, backoff, due) = (None, Instant::now(), BACKOFF_MIN, None);
        Self { name, arguments, ready_file, child, started, backoff, due }
    }

    /// One more flag with its value.
    pub fn argument(&mut self, flag: &str, value: impl ToString) {
        self.arguments.push(format!("{flag}={}", value.to_string()));
    }

    /// One more flag without a value.
    pub fn flag(&mut self, flag: &str) {
        self.arguments.push(flag.to_owned());
    }

    /// As `argument`, if there is a value.
    pub fn optional(&mut self, flag: &str, value: Option<&String>) {
        if let Some(value) = value {
            self.argument(flag, value);
        }
    }

    /// Has the program check the settings, without starting anything. The error is one line.
    pub async fn check_settings(&self) -> Result<(), String> {
        let program = std::env::current_exe().map_err(|error| format!("find own program: {error}"))?;
        let output = Command::new(program).args(&self.arguments).arg("--print-config").output().await;
        let output = output.map_err(|error| format!("start {}: {error}", self.name))?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        if output.status.success() { Ok(()) } else { Err(complaint.trim().to_owned()) }
    }

    /// Starts the process. Its standard output goes to our standard error: ours is for scripts.
    pub fn start(&mut self) -> Result<(), String> {
        let _ = std::fs::remove_file(&self.ready_file);
        let program = std::env::current_exe().map_err(|error| format!("find own program: {error}"))?;
        let stderr = std::io::stderr().as_fd().try_clone_to_owned();
        let stderr = stderr.map_err(|error| format!("duplicate standard error: {error}"))?;
        let child = Command::new(program)
            .args(&self.arguments)
            .arg("--ready-file")
            .arg(&self.ready_file)
            .env(PARENT_PID, std::process::id().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::from(stderr))
            // Ctrl-C reaches only us; we stop the parts in order.
            .process_group(0)
            .spawn();
        self.child = Some(child.map_err(|error| format!("start {}: {error}", self.name))?);
        self.started = Instant::now();
        self.due = None;
        Ok(())
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().and_then(Child::id).unwrap_or(0)
    }

    /// What it said when it was ready.
    pub fn ready(&self) -> Option<Ready> {
        Ready::read(&self.ready_file)
    }

    /// Waits until it serves, has ended, or is late.
    pub async fn wait_ready(&mut self, limit: Duration) {
        let late = Instant::now() + limit;
        let has_ended = |part: &mut Self| match part.child.as_mut().map(Child::try_wait) {
            Some(Ok(None)) => false,
            Some(Ok(Some(_)) | Err(_)) | None => true,
        };
        while self.ready().is_none() && !has_ended(self) && Instant::now() < late {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// If it ended: how, and the exit code if it has one.
    pub fn ended(&mut self) -> Option<(String, Option<i32>)> {
        let status = self.child.as_mut()?.try_wait().ok()??;
        self.child = None;
        Some((status.to_string(), status.code()))
    }

    /// Decides when it is started again, and returns the pause.
    pub fn schedule_restart(&mut self) -> Duration {
        if self.started.elapsed() > HEALTHY {
            self.backoff = BACKOFF_MIN;
        }
        let pause = self.backoff;
        self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
        self.due = Some(Instant::now() + pause);
        pause
    }

    /// Later starts use this value.
    pub fn set_argument(&mut self, flag: &str, value: &str) {
        let given = format!("{flag}=");
        self.arguments.retain(|argument| !argument.starts_with(&given));
        self.argument(flag, value);
    }

    /// Asks it to stop, and after `patience` makes it.
    pub async fn stop(&mut self, patience: Duration) {
        let Some(mut child) = self.child.take() else { return };
        if let Some(pid) =
            child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(rustix::process::Pid::from_raw)
        {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        if tokio::time::timeout(patience, child.wait()).await.is_err() {
            tracing::warn!(part = self.name, "did not stop in time and is killed");
            let _ = child.kill().await;
        }
    }
}
