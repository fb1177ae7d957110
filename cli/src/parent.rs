//! A part that was started by `kvbm up` ends when `kvbm up` ends, however that ends.

use std::io;

use rustix::process::{self, Pid, Signal};

/// Variable in which `kvbm up` tells its children its process id.
pub(crate) const PARENT_PID: &str = "KVBM_PARENT_PID";

/// Asks the kernel to end this process together with its parent, if it is a child of `kvbm up`.
pub(crate) fn follow() -> io::Result<()> {
    let Some(parent) = std::env::var(PARENT_PID).ok().and_then(|pid| pid.parse().ok()) else {
        return Ok(());
    };
    process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have ended before the kernel was asked.
    if process::getppid().map(Pid::as_raw_nonzero).map(|pid| pid.get()) == Some(parent) {
        Ok(())
    } else {
        Err(io::Error::other("kvbm up is gone"))
    }
}
