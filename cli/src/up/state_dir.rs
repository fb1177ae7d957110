//! The folder in which one `kvbm up` keeps its sockets, and which only one uses at a time.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// Unix socket paths have at most 107 bytes; ours add this much to the folder.
const SOCKET_NAME_BYTES: usize = "/run/worker-64.sock".len();
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// See the module.
#[derive(Debug)]
pub(super) struct StateDir {
    path: PathBuf,
    _lock: File,
}

impl StateDir {
    /// Makes the folder and locks it.
    pub fn open(wanted: Option<PathBuf>) -> Result<Self, String> {
        let path = wanted.unwrap_or_else(default);
        fs::create_dir_all(path.join("run"))
            .map_err(|error| format!("create {}: {error}", path.display()))?;
        let path = path.canonicalize().map_err(|error| format!("find {}: {error}", path.display()))?;
        if path.as_os_str().len() + SOCKET_NAME_BYTES > SOCKET_PATH_BYTES_MAX {
            let most = SOCKET_PATH_BYTES_MAX - SOCKET_NAME_BYTES;
            return Err(format!(
                "--state-dir {}: at most {most} bytes, for socket paths are short",
                path.display()
            ));
        }
        let lock_path = path.join("lock");
        let lock =
            File::create(&lock_path).map_err(|error| format!("create {}: {error}", lock_path.display()))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            format!(
                "--state-dir {}: another kvbm up is running there; stop it or name another folder",
                path.display()
            )
        })?;
        Ok(Self { path, _lock: lock })
    }

    /// The daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.path.join("kvbm.sock")
    }

    /// Sockets of workers and ready files.
    pub fn run_dir(&self) -> PathBuf {
        self.path.join("run")
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// $KVBM_STATE_DIR, else $XDG_STATE_HOME/kvbm, or what that stands for.
pub(super) fn default() -> PathBuf {
    if let Some(named) = std::env::var_os("KVBM_STATE_DIR") {
        return named.into();
    }
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")));
    state.unwrap_or_else(std::env::temp_dir).join("kvbm")
}
