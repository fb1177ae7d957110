//! `kvbm up` as a user starts it.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::node::{PATIENCE, get, metric_in};
use crate::process::program;
use crate::wait::eventually_within;

/// See the module.
#[derive(Debug)]
pub struct Up {
    /// The process.
    pub child: Child,
    /// What it printed when it was ready.
    pub ready: Value,
    /// Its state directory, which a later one may use again.
    pub dir: Arc<TempDir>,
}

impl Up {
    /// Starts it in a folder of its own and waits until it is ready.
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_in(Arc::new(tempfile::Builder::new().prefix("kvbm").tempdir().unwrap()), arguments, &[])
    }

    /// Starts it in this folder, with these variables.
    pub fn start_in(dir: Arc<TempDir>, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let mut child = Command::new(program())
            .args(["up", "--json", "--metrics-port", "0", "--cpu-cache-gb", "0.1", "--state-dir"])
            .arg(dir.path())
            .args(if arguments.contains(&"--http-port") { &[][..] } else { &["--http-port", "0"] })
            .args(arguments)
            .envs(PATIENCE)
            .envs(environment.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::from(log))
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let ready = serde_json::from_str(&line).unwrap_or_else(|_| {
            panic!("not ready: {}", std::fs::read_to_string(log_of(dir.path())).unwrap())
        });
        Self { child, ready, dir }
    }

    /// Processes of the parts, in the order of starting, workers last.
    pub fn pids(&self) -> Vec<u64> {
        let pids = &self.ready["pids"];
        let workers = pids["workers"].as_array().unwrap().iter().map(|pid| pid.as_u64().unwrap());
        [&pids["holder"], &pids["daemon"], &pids["frontend"]]
            .map(|pid| pid.as_u64().unwrap())
            .into_iter()
            .chain(workers)
            .collect()
    }

    /// Kills parts, as they were when all was ready, with -9: `holder`, `daemon`, `frontend`, `workers`.
    pub fn kill(&self, parts: &[&str]) {
        for part in parts {
            let pids = &self.ready["pids"][part];
            for pid in pids.as_array().map_or(std::slice::from_ref(pids), Vec::as_slice) {
                let pid = Pid::from_raw(pid.as_u64().unwrap() as i32).unwrap();
                kill_process(pid, Signal::KILL).unwrap();
            }
        }
    }

    /// Asks it to end, and waits for that.
    pub fn terminate(&mut self) -> ExitStatus {
        kill_process(Pid::from_raw(self.child.id() as i32).unwrap(), Signal::TERM).unwrap();
        eventually_within(Duration::from_secs(30), "kvbm up ends", || self.child.try_wait().unwrap())
    }

    /// Everything its parts logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(log_of(self.dir.path())).unwrap()
    }

    /// Where the frontend serves this.
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.ready["http"].as_str().unwrap())
    }

    /// Sum of a metric of the daemon over its labels, or over those lines that contain `label`. Fails while there is no
    /// daemon.
    pub fn metric(&self, name: &str, label: &str) -> f64 {
        metric_in(&get(self.ready["metrics"].as_str().unwrap()), name, label)
    }

    /// As [`Up::metric`], while a daemon may be on its way.
    pub fn try_metric(&self, name: &str, label: &str) -> Option<f64> {
        let mut answer = ureq::get(self.ready["metrics"].as_str().unwrap()).call().ok()?;
        Some(metric_in(&answer.body_mut().read_to_string().ok()?, name, label))
    }

    /// Status, cached tokens, answer.
    pub fn post(&self, path: &str, body: &Value) -> (u16, String, Value) {
        self.try_post(path, body).unwrap()
    }

    /// As [`Up::post`], while a frontend may be on its way.
    pub fn try_post(&self, path: &str, body: &Value) -> Result<(u16, String, Value), ureq::Error> {
        let agent =
            ureq::Agent::new_with_config(ureq::Agent::config_builder().http_status_as_error(false).build());
        let request = agent.post(self.url(path)).header("content-type", "application/json");
        let mut response = request.send(body.to_string())?;
        let cached =
            response.headers().get("x-kvbm-cached-tokens").map_or("", |v| v.to_str().unwrap()).to_owned();
        let status = response.status().as_u16();
        let text = response.body_mut().read_to_string()?;
        Ok((status, cached, serde_json::from_str(&text).unwrap_or(Value::Null)))
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            eprintln!("--- up ---");
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
}

fn log_of(dir: &Path) -> PathBuf {
    dir.join("log")
}
