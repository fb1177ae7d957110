//! Where a worker is reached: a Unix socket, or TCP.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::{TcpListener, UnixListener};

use crate::WorkerError;

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Address {
    /// A path.
    Unix(PathBuf),
    /// Host and port.
    Tcp(String),
}

impl Address {
    /// Reads `unix:/path`, `http://host:port` or `tcp://host:port`.
    pub fn parse(text: &str) -> Option<Self> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return (path.len() > 1 && path.starts_with('/')).then(|| Self::Unix(path.into()));
        }
        let authority = text.strip_prefix("http://").or_else(|| text.strip_prefix("tcp://"))?;
        let authority = authority.trim_end_matches('/');
        let (host, port) = authority.rsplit_once(':')?;
        let plain = !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok();
        plain.then(|| Self::Tcp(authority.to_owned()))
    }

    /// Binds it. A socket file that nobody listens at is replaced.
    pub async fn bind(&self) -> Result<Listener, WorkerError> {
        let error = |source| WorkerError::Listen { endpoint: self.to_string(), source };
        match self {
            Self::Unix(path) => {
                clear(path).map_err(error)?;
                let listener = UnixListener::bind(path).map_err(error)?;
                let mode = std::fs::Permissions::from_mode(0o660);
                std::fs::set_permissions(path, mode).map_err(error)?;
                let file = SocketFile::of(path).map_err(error)?;
                Ok(Listener {
                    accepts: Accepts::Unix(listener),
                    endpoint: self.to_string(),
                    file: Some(file),
                })
            }
            Self::Tcp(authority) => {
                let listener = TcpListener::bind(authority).await.map_err(error)?;
                let mut address = listener.local_addr().map_err(error)?;
                if address.ip().is_unspecified() {
                    // Who is told about this endpoint is on this node.
                    address.set_ip([127, 0, 0, 1].into());
                }
                let endpoint = Self::Tcp(address.to_string()).to_string();
                Ok(Listener { accepts: Accepts::Tcp(listener), endpoint, file: None })
            }
        }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(authority) => write!(f, "http://{authority}"),
        }
    }
}

/// A bound address.
#[derive(Debug)]
pub(crate) struct Listener {
    /// Takes connections.
    pub accepts: Accepts,
    /// How clients name it.
    pub endpoint: String,
    /// Removed when dropped.
    pub file: Option<SocketFile>,
}

/// The listening socket.
#[derive(Debug)]
pub(crate) enum Accepts {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// The file of a Unix socket, removed on drop unless another socket took its place.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    identity: Identity,
}

/// Inode and time of its last change: inode numbers are used again.
type Identity = (u64, i64, i64);

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(path)? })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            // Whoever removed it before did our work.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<Identity> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.ino(), metadata.ctime(), metadata.ctime_nsec()))
}

/// Removes a socket that nobody listens at.
fn clear(path: &Path) -> io::Result<()> {
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !metadata.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is not a socket"));
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process serves there"));
    }
    std::fs::remove_file(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_printed() {
        for (text, printed) in [
            ("unix:/run/w.sock", "unix:/run/w.sock"),
            ("unix:///run/w.sock", "unix:/run/w.sock"),
            ("http://127.0.0.1:0", "http://127.0.0.1:0"),
            ("tcp://[::1]:90", "http://[::1]:90"),
        ] {
            assert_eq!(Address::parse(text).unwrap().to_string(), printed);
        }
        for text in ["", "unix:", "unix:w.sock", "http://host", "http://:1", "https://h:1", "http://h:70000"]
        {
            assert_eq!(Address::parse(text), None, "{text}");
        }
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_a_live_one_and_a_plain_file_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let address = Address::Unix(folder.path().join("w.sock"));
        let first = address.bind().await.unwrap();
        assert!(address.bind().await.unwrap_err().to_string().contains("another process serves there"));
        // As after a kill: the file stays, nobody listens.
        let Listener { accepts, file, .. } = first;
        drop(accepts);
        let second = address.bind().await.unwrap();
        drop(file);
        assert!(folder.path().join("w.sock").exists(), "it is the second one's");
        drop(second);
        assert!(!folder.path().join("w.sock").exists());
        std::fs::write(folder.path().join("w.sock"), "text").unwrap();
        assert!(address.bind().await.is_err());
    }
}
