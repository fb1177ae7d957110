//! Another process: this binary in a role, and the channel to it.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kvbm_shm::{SideListener, SideSocket};

use crate::{Gpu, interference, leaks, sharing, words};

/// Longer than anything takes that works.
const LIMIT: Duration = Duration::from_secs(60);

/// Packets with text and descriptors, one waiting for the other.
pub struct Channel(SideSocket);

impl Channel {
    pub fn send(&self, text: &str, fds: &[BorrowedFd<'_>]) -> Result<(), String> {
        self.0.send_fds(text.as_bytes(), fds).map_err(|error| error.to_string())
    }

    pub fn send_bytes(&self, bytes: &[u8]) -> Result<(), String> {
        self.0.send_fds(bytes, &[]).map_err(|error| error.to_string())
    }

    pub fn receive(&self) -> Result<(Vec<u8>, Vec<OwnedFd>), String> {
        let deadline = Instant::now() + LIMIT;
        while Instant::now() < deadline {
            if self.0.wait_readable(Duration::from_secs(1)).map_err(|error| error.to_string())? {
                let packet = self.0.receive_fds().map_err(|error| error.to_string())?;
                return packet.ok_or_else(|| "the other process ended".into());
            }
        }
        Err("the other process says nothing".into())
    }

    /// Receives exactly this text.
    pub fn expect(&self, text: &str) -> Result<Vec<OwnedFd>, String> {
        let (bytes, fds) = self.receive()?;
        let got = String::from_utf8_lossy(&bytes);
        if got == text { Ok(fds) } else { Err(format!("\"{got}\" instead of \"{text}\"")) }
    }

    /// Waits until the other end closes.
    pub fn wait_closed(&self) {
        while !self.0.is_hung_up().unwrap_or(true) {
            let _ = self.0.wait_readable(Duration::from_millis(100));
        }
    }
}

/// A process in a role. Killed when dropped.
pub struct Peer {
    child: Child,
    pub channel: Channel,
}

impl Peer {
    pub fn start(role: &str) -> Result<Self, String> {
        static COUNT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("kvbm-gpu-{}-{number}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = SideListener::bind(&path).map_err(|error| error.to_string())?;
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let mut child = Command::new(program)
            .args(["--role", role, "--socket"])
            .arg(&path)
            .stdin(Stdio::null())
            .spawn()
            .map_err(|error| error.to_string())?;
        let deadline = Instant::now() + LIMIT;
        let socket = loop {
            match listener.accept() {
                Ok(socket) => break socket,
                Err(error) if error.is_would_block() => {}
                Err(error) => return Err(error.to_string()),
            }
            if let Ok(Some(status)) = child.try_wait() {
                return Err(format!("the process in the role {role} ended: {status}"));
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                return Err(format!("the process in the role {role} does not come"));
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        let _ = std::fs::remove_file(&path);
        Ok(Self { child, channel: Channel(socket) })
    }

    /// Kills it with SIGKILL, and waits until the kernel has taken everything from it.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits until it ends well.
    pub fn finish(mut self) -> Result<(), String> {
        self.channel.send("end", &[])?;
        let status = self.child.wait().map_err(|error| error.to_string())?;
        if status.success() { Ok(()) } else { Err(format!("the other process: {status}")) }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The other side of [`Peer::start`].
pub fn play(role: &str, socket: &Path) {
    let played = SideSocket::connect(socket).map_err(|error| error.to_string()).and_then(|socket| {
        let gpu: Gpu = crate::open().map_err(|error| error.to_string())?;
        let channel = Channel(socket);
        match role {
            "vmm-owner" => sharing::play_vmm_owner(&gpu, &channel),
            "ipc-owner" => sharing::play_ipc_owner(&gpu, &channel),
            "writer" => sharing::play_writer(&gpu, &channel),
            "registrar" => sharing::play_registrar(&gpu, &channel),
            "ponger" => words::play_ponger(&gpu, &channel),
            "late-writer" => words::play_late_writer(&gpu, &channel),
            "decoder" => interference::play_decoder(&gpu, &channel),
            "victim" => leaks::play_victim(&gpu, &channel),
            other => Err(format!("no role {other}")),
        }
    });
    if let Err(error) = played {
        eprintln!("role {role}: {error}");
        std::process::exit(1);
    }
}
