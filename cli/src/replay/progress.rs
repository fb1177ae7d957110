//! How far a long replay is, on standard error, if somebody looks.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Events between two looks at the clock.
const STEPS: u64 = 1024;
/// Between two lines.
const PERIOD: Duration = Duration::from_millis(200);

/// See the module.
#[derive(Debug)]
pub(super) struct Progress {
    what: Option<String>,
    done: u64,
    total: u64,
    shown: Instant,
    is_visible: bool,
}

impl Progress {
    /// Silent if standard error is no terminal.
    pub(super) fn new(what: String, total: usize) -> Self {
        let what = std::io::stderr().is_terminal().then_some(what);
        Self { what, done: 0, total: total as u64, shown: Instant::now(), is_visible: false }
    }

    pub(super) fn step(&mut self) {
        self.done += 1;
        let Some(what) = self.what.as_ref().filter(|_| self.done.is_multiple_of(STEPS)) else { return };
        if self.shown.elapsed() > PERIOD {
            self.shown = Instant::now();
            self.is_visible = true;
            let percent = self.done * 100 / self.total.max(1);
            eprint!("\r{what}: {percent} %\x1b[K");
            // Nobody is harmed by a line that is not seen.
            let _ = std::io::stderr().flush();
        }
    }

    /// Removes the line.
    pub(super) fn done(&mut self) {
        if self.is_visible {
            eprint!("\r\x1b[K");
        }
    }
}
