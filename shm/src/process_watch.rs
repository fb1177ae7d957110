//! Whether a process is alive, by the kernel's word (pidfd). A missed heartbeat never means that it is dead.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::Error;

/// Holds a pidfd: it keeps naming the same process even when its number is used again.
#[derive(Debug)]
pub struct ProcessWatch {
    pidfd: OwnedFd,
    pid: u32,
}

impl ProcessWatch {
    /// Watches a living process.
    pub fn open(pid: u32) -> Result<Self, Error> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let raw = raw.ok_or_else(|| Error::refused(format!("{pid} is not a process id")))?;
        let pidfd =
            pidfd_open(raw, PidfdFlags::empty()).map_err(Error::system("open pidfd of", pid.to_string()))?;
        Ok(Self { pidfd, pid })
    }

    /// Watches the process that a descriptor names, received from somebody else. Its number is not known: 0.
    pub fn from_fd(pidfd: OwnedFd) -> Self {
        Self { pidfd, pid: 0 }
    }

    /// The same through a descriptor of its own.
    pub fn try_clone(&self) -> Result<Self, Error> {
        let pidfd = rustix::io::fcntl_dupfd_cloexec(&self.pidfd, 0);
        let pidfd = pidfd.map_err(Error::system("duplicate pidfd of", self.pid.to_string()))?;
        Ok(Self { pidfd, pid: self.pid })
    }

    /// The number it was opened with.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// True once all its threads have ended: it will not touch memory again.
    pub fn is_dead(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(poll(&mut fds, Some(&now)), Ok(1..))
    }
}

impl AsFd for ProcessWatch {
    /// Readable once the process is dead.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn death_is_seen_and_life_is_not_mistaken_for_it() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let watch = ProcessWatch::open(child.id()).unwrap();
        assert!(!watch.is_dead());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(watch.is_dead());
        assert!(ProcessWatch::open(0).is_err());
    }
}
