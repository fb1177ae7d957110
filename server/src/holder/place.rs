//! The holder's socket, claimed so that there is one holder per path.
//!
//! The claim is a lock on a file beside the socket, as the daemon has one: the kernel drops it when the process ends,
//! however it ends. So whoever has it may remove the socket that a dead holder left. The file itself stays, because
//! removing a lock file races.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use kvbm_shm::{SideListener, SideSocket};
use rustix::fs::{FlockOperation, flock};

use super::HolderError;

/// An owned socket. Fields are dropped in this order: the claim is given up last.
#[derive(Debug)]
pub(super) struct Place {
    pub listener: SideListener,
    pub claim: Claim,
}

/// Held as long as the socket is ours.
#[derive(Debug)]
pub(super) struct Claim(#[expect(dead_code, reason = "it is held, not used")] File);

impl Place {
    /// Listens at `path`, replacing what a dead holder left, or says that a holder lives there.
    pub fn claim(path: &Path) -> Result<Self, HolderError> {
        if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
            let made = std::fs::DirBuilder::new().recursive(true).mode(0o750).create(directory);
            made.map_err(HolderError::io("create directory", directory))?;
        }
        let claim = lock(path)?;
        clear(path)?;
        let listener = SideListener::bind(path)?;
        // Others are refused in any case; so they need not knock.
        std::fs::set_permissions(path, Permissions::from_mode(0o600))
            .map_err(HolderError::io("set mode of", path))?;
        Ok(Self { listener, claim })
    }
}

fn lock(path: &Path) -> Result<Claim, HolderError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let lock = PathBuf::from(name);
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let mut file = options.open(&lock).map_err(HolderError::io("open", &lock))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut text = String::new();
            let pid = file.read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
            return Err(HolderError::InUse { path: path.to_owned(), pid });
        }
        Err(errno) => return Err(HolderError::io("lock", &lock)(errno.into())),
    }
    let written = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
    written.map_err(HolderError::io("write", &lock))?;
    Ok(Claim(file))
}

/// Removes a socket that nobody listens at.
fn clear(path: &Path) -> Result<(), HolderError> {
    let kind = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(HolderError::io("look at", path)(error)),
    };
    if !kind.is_socket() {
        return Err(HolderError::NotASocket { path: path.to_owned() });
    }
    // Only this answer says that nobody listens. All others may come from a program that does not know our lock.
    let nobody = matches!(
        SideSocket::connect(path),
        Err(kvbm_shm::Error::System { source, .. }) if source.kind() == ErrorKind::ConnectionRefused
    );
    if !nobody {
        return Err(HolderError::InUse { path: path.to_owned(), pid: None });
    }
    std::fs::remove_file(path).map_err(HolderError::io("remove", path))
}
