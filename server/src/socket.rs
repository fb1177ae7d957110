//! The daemon's two sockets, claimed so that there is one daemon per path.
//!
//! The claim is a lock on a file beside the socket: the kernel drops it when the process ends, however it ends. So
//! whoever holds it may remove what a dead daemon left. The file itself stays, because removing a lock file races.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use kvbm_shm::SideListener;
use rustix::fs::{FlockOperation, flock};
use tokio::net::UnixListener;

use crate::Config;
use crate::error::StartError;

/// Owned sockets. Fields are dropped in this order: the claim is given up last.
#[derive(Debug)]
pub(crate) struct Sockets {
    /// gRPC. Taken by the server.
    pub grpc: Option<UnixListener>,
    /// The side channel. Taken by the task that accepts there.
    pub side: Option<SideListener>,
    _path: RemovedOnDrop,
    _claim: File,
}

#[derive(Debug)]
struct RemovedOnDrop(PathBuf);

impl Drop for RemovedOnDrop {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Sockets {
    /// Binds both, replacing what a dead daemon left, or says that a daemon lives there.
    pub fn bind(config: &Config) -> Result<Self, StartError> {
        let path = &config.socket;
        for directory in [Some(config.state_dir.as_path()), path.parent()].into_iter().flatten() {
            create_directory(directory)?;
        }
        let claim = claim(&config.socket_lock(), path)?;
        let side_path = config.side_socket();
        for path in [path, &side_path] {
            clear(path)?;
        }
        let grpc = UnixListener::bind(path).map_err(StartError::io("bind", path))?;
        let removed = RemovedOnDrop(path.clone());
        let mode = std::fs::Permissions::from_mode(0o660);
        std::fs::set_permissions(path, mode).map_err(StartError::io("set mode of", path))?;
        let side = SideListener::bind(&side_path)?;
        Ok(Self { grpc: Some(grpc), side: Some(side), _path: removed, _claim: claim })
    }
}

fn create_directory(path: &Path) -> Result<(), StartError> {
    if path.as_os_str().is_empty() {
        return Ok(());
    }
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o750).create(path);
    made.map_err(StartError::io("create directory", path))
}

fn claim(lock: &Path, socket: &Path) -> Result<File, StartError> {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create(true).truncate(false).mode(0o640);
    let mut file = options.open(lock).map_err(StartError::io("open", lock))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut text = String::new();
            let pid = file.read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
            return Err(StartError::InUse { socket: socket.to_owned(), pid });
        }
        Err(errno) => return Err(StartError::io("lock", lock)(errno.into())),
    }
    let written = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
    written.map_err(StartError::io("write", lock))?;
    Ok(file)
}

/// Removes a socket that nobody listens at.
fn clear(path: &Path) -> Result<(), StartError> {
    let kind = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(StartError::io("look at", path)(error)),
    };
    if !kind.is_socket() {
        return Err(StartError::NotASocket { path: path.to_owned() });
    }
    // A stream socket of another program that does not know our lock. (The side channel refuses stream connections.)
    if UnixStream::connect(path).is_ok() {
        return Err(StartError::InUse { socket: path.to_owned(), pid: None });
    }
    std::fs::remove_file(path).map_err(StartError::io("remove", path))
}
