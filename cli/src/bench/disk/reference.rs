//! What the engine is measured against: fio, and without it a loop around a ring.

use std::process::{Command, Stdio};
use std::sync::Arc;

use kvbm::disk_io::PlainLoop;
use kvbm_shm::SharedMemory;
use serde::Deserialize;

use super::engine::{IO_BYTES_MAX, bench_memory};
use super::scratch::{Scratch, inherit};
use super::{Direction, Figure, Task};

/// fio rounds up.
const FIO_SPARE_BYTES: usize = 4 << 20;

/// See the header.
pub(super) struct Reference<'a> {
    scratch: &'a Scratch,
    depth: usize,
    /// The same kind of memory as the engine's: drives are much slower with scattered pages.
    memory: Arc<SharedMemory>,
    kind: Kind,
}

enum Kind {
    Fio { version: String },
    Plain,
}

/// The part of fio's report that matters.
#[derive(Debug, Deserialize)]
struct Report {
    jobs: Vec<Job>,
}

#[derive(Debug, Deserialize)]
struct Job {
    error: i32,
    read: Side,
    write: Side,
    /// Percent of the runtime.
    usr_cpu: f64,
    sys_cpu: f64,
}

#[derive(Debug, Deserialize)]
struct Side {
    io_bytes: u64,
    /// Milliseconds.
    runtime: u64,
}

impl<'a> Reference<'a> {
    /// fio, if it is installed.
    pub fn find(scratch: &'a Scratch, depth: usize) -> Result<Self, String> {
        let kind = match Command::new("fio").arg("--version").output() {
            Ok(answer) if answer.status.success() => {
                Kind::Fio { version: String::from_utf8_lossy(&answer.stdout).trim().to_owned() }
            }
            _ => Kind::Plain,
        };
        Self::new(scratch, depth, kind)
    }

    /// The loop, in any case.
    #[cfg(test)]
    pub fn plain(scratch: &'a Scratch, depth: usize) -> Result<Self, String> {
        Self::new(scratch, depth, Kind::Plain)
    }

    fn new(scratch: &'a Scratch, depth: usize, kind: Kind) -> Result<Self, String> {
        let memory = bench_memory(depth * IO_BYTES_MAX + FIO_SPARE_BYTES)?;
        Ok(Self { scratch, depth, memory, kind })
    }

    pub fn name(&self) -> &'static str {
        match self.kind {
            Kind::Fio { .. } => "fio",
            Kind::Plain => "plain loop",
        }
    }

    pub fn describe(&self) -> String {
        match &self.kind {
            Kind::Fio { version } => format!("{version} (io_uring, direct, fixedbufs, registerfiles)"),
            Kind::Plain => "a plain loop around io_uring, because there is no fio here".to_owned(),
        }
    }

    pub fn run(&self, task: Task) -> Result<Figure, String> {
        match self.kind {
            Kind::Fio { .. } => self.fio(task),
            Kind::Plain => self.plain_loop(task),
        }
    }

    fn plain_loop(&self, task: Task) -> Result<Figure, String> {
        let figures = PlainLoop {
            file: self.scratch.file(),
            file_bytes: self.scratch.bytes(),
            memory: &self.memory,
            io_bytes: task.io_bytes as u32,
            depth: self.depth as u32,
            writes: task.direction == Direction::Write,
        };
        let figures = figures.run(task.time).map_err(|error| format!("run the plain loop: {error}"))?;
        Ok(Figure { bytes: figures.bytes, seconds: figures.seconds, cpu_seconds: figures.cpu_seconds })
    }

    fn fio(&self, task: Task) -> Result<Figure, String> {
        let descriptor = inherit(self.scratch.file())?;
        let memory = inherit(self.memory.fd())?;
        let output = Command::new("fio")
            .args(["--name=kvbm", "--thread", "--output-format=json", "--ioengine=io_uring", "--direct=1"])
            .args(["--fixedbufs", "--registerfiles", "--fallocate=none", "--time_based"])
            // What costs fio time that it would not spend on moving bytes.
            .args(["--gtod_reduce=1", "--scramble_buffers=0"])
            .arg(format!("--filename=/proc/self/fd/{descriptor}"))
            // For fio a file of huge pages is one that it takes as it is.
            .arg(format!("--iomem=mmaphuge:/proc/self/fd/{memory}"))
            .arg(format!("--size={}", self.scratch.bytes()))
            .arg(format!("--iodepth={}", self.depth))
            .arg(format!("--bs={}", task.io_bytes))
            .arg(format!("--rw={}", task.direction.name()))
            .arg(format!("--runtime={}ms", task.time.as_millis()))
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("run fio: {error}"))?;
        let complaint = || format!("fio failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        let report: Report = serde_json::from_slice(&output.stdout).map_err(|_| complaint())?;
        let job = report.jobs.first().filter(|job| job.error == 0).ok_or_else(complaint)?;
        let side = match task.direction {
            Direction::Write => &job.write,
            Direction::Read => &job.read,
        };
        if side.io_bytes == 0 || side.runtime == 0 {
            return Err(complaint());
        }
        let seconds = side.runtime as f64 / 1e3;
        let cpu_seconds = (job.usr_cpu + job.sys_cpu) / 100.0 * seconds;
        Ok(Figure { bytes: side.io_bytes, seconds, cpu_seconds })
    }
}
