//! The daemon whose workers are served: on this node, or over TCP on another.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use http::Uri;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use tonic::metadata::{Ascii, MetadataValue};

use super::Endpoint;

/// The daemon takes no longer token.
const TOKEN_BYTES_MAX: u64 = 4096;

/// Where the daemon is, and what is shown to it.
#[derive(Clone)]
pub struct Daemon {
    endpoint: Endpoint,
    tls: Option<Tls>,
    authorization: Option<MetadataValue<Ascii>>,
}

/// TLS with the daemon.
#[derive(Clone)]
pub(super) struct Tls {
    pub connector: TlsConnector,
    pub name: ServerName<'static>,
}

/// Files that go with an address over TCP.
#[derive(Debug, Clone, Default)]
pub struct DaemonFiles {
    /// Authorities that the daemon's certificate may come from, PEM.
    pub ca: Option<PathBuf>,
    /// Token, one line.
    pub token: Option<PathBuf>,
    /// Own certificate, PEM.
    pub cert: Option<PathBuf>,
    /// Its key, PEM.
    pub key: Option<PathBuf>,
}

/// A flag that cannot be used as it is, and what it must be.
#[derive(Debug)]
pub struct Unusable {
    /// With its dashes.
    pub flag: &'static str,
    /// In words.
    pub must_be: String,
}

fn unusable(flag: &'static str, must_be: impl Into<String>) -> Unusable {
    Unusable { flag, must_be: must_be.into() }
}

impl Daemon {
    /// On this node.
    pub fn at_socket(socket: PathBuf) -> Self {
        Self { endpoint: Endpoint::Unix(socket), tls: None, authorization: None }
    }

    /// Reads `unix:/path`, `http://host:port` or `https://host:port`, and the files that go with it.
    pub fn parse(text: &str, files: &DaemonFiles) -> Result<Self, Unusable> {
        let secure = text.strip_prefix("https://");
        let endpoint = match secure {
            Some(authority) => Endpoint::parse(&format!("http://{authority}")),
            None => Endpoint::parse(text),
        };
        let endpoint = endpoint
            .ok_or_else(|| unusable("--daemon", "unix:/path, http://host:port or https://host:port"))?;
        let tls = match secure {
            Some(_) => Some(tls(&endpoint, files)?),
            None => {
                let given = [
                    ("--daemon-ca", &files.ca),
                    ("--daemon-cert", &files.cert),
                    ("--daemon-key", &files.key),
                ];
                if let Some((flag, _)) = given.iter().find(|(_, path)| path.is_some()) {
                    return Err(unusable(flag, "given only with --daemon https://host:port"));
                }
                None
            }
        };
        let authorization = match &files.token {
            None => None,
            Some(_) if matches!(endpoint, Endpoint::Unix(_)) => {
                return Err(unusable("--daemon-token-file", "given only with a --daemon over TCP"));
            }
            Some(_) if tls.is_none() && !endpoint.is_loopback() => {
                let must_be = "given only with https://host:port, or with http:// to this machine: others could read it";
                return Err(unusable("--daemon-token-file", must_be));
            }
            Some(path) => {
                Some(authorization(path).map_err(|must_be| unusable("--daemon-token-file", must_be))?)
            }
        };
        Ok(Self { endpoint, tls, authorization })
    }

    pub(super) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub(super) fn tls(&self) -> Option<&Tls> {
        self.tls.as_ref()
    }

    /// The URI that requests carry.
    pub(super) fn origin(&self) -> Uri {
        match self.tls {
            Some(_) => self.to_string().parse().unwrap_or_else(|_| self.endpoint.origin()),
            None => self.endpoint.origin(),
        }
    }

    /// A request that shows the token.
    pub(super) fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        if let Some(authorization) = &self.authorization {
            request.metadata_mut().insert("authorization", authorization.clone());
        }
        request
    }

    /// Why a worker that this daemon lists cannot be reached from here, if so.
    pub(super) fn hides(&self, worker: &Endpoint) -> Option<&'static str> {
        match (&self.endpoint, worker) {
            (Endpoint::Unix(_), _) => None,
            (Endpoint::Tcp(_), Endpoint::Unix(_)) => Some(
                "it listens on a Unix socket of the daemon's machine; start it with --listen http://host:port",
            ),
            (Endpoint::Tcp(_), Endpoint::Tcp(_)) if worker.is_loopback() && !self.endpoint.is_loopback() => {
                Some(
                    "it listens on the loopback address of the daemon's machine; start it with another --listen",
                )
            }
            (Endpoint::Tcp(_), Endpoint::Tcp(_)) => None,
        }
    }
}

impl fmt::Display for Daemon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.tls, &self.endpoint) {
            (Some(_), Endpoint::Tcp(authority)) => write!(f, "https://{authority}"),
            (_, endpoint) => endpoint.fmt(f),
        }
    }
}

/// Without what is secret.
impl fmt::Debug for Daemon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Daemon({self})")
    }
}

/// One line that only its owner can read.
fn authorization(path: &Path) -> Result<MetadataValue<Ascii>, String> {
    let unreadable = |error| format!("a file that can be read ({error})");
    let file = File::open(path).map_err(unreadable)?;
    let mode = file.metadata().map_err(unreadable)?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(format!(
            "a file that group and others cannot read (its mode is {mode:03o}, not 600 or 400)"
        ));
    }
    let mut text = String::new();
    file.take(TOKEN_BYTES_MAX + 3).read_to_string(&mut text).map_err(unreadable)?;
    let token = text.trim_end();
    let usable = !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
    let value = usable.then(|| MetadataValue::try_from(format!("Bearer {token}")).ok()).flatten();
    let mut value = value.ok_or("a file with one line of printable characters without spaces")?;
    value.set_sensitive(true);
    Ok(value)
}

fn tls(endpoint: &Endpoint, files: &DaemonFiles) -> Result<Tls, Unusable> {
    let ca = files.ca.as_deref();
    let ca = ca.ok_or_else(|| unusable("--daemon-ca", "given with https://host:port"))?;
    let mut roots = RootCertStore::empty();
    for authority in certificates("--daemon-ca", ca)? {
        let added = roots.add(authority);
        added.map_err(|error| unusable("--daemon-ca", format!("a PEM file of authorities ({error})")))?;
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .expect("ring has all that TLS 1.3 needs")
        .with_root_certificates(roots);
    let mut config = match (&files.cert, &files.key) {
        (None, None) => builder.with_no_client_auth(),
        (Some(_), None) => return Err(unusable("--daemon-cert", "given together with --daemon-key")),
        (None, Some(_)) => return Err(unusable("--daemon-key", "given together with --daemon-cert")),
        (Some(cert), Some(key)) => {
            let chain = certificates("--daemon-cert", cert)?;
            let key = PrivateKeyDer::from_pem_file(key).map_err(|error| {
                unusable("--daemon-key", format!("a PEM file with a private key ({error})"))
            })?;
            builder.with_client_auth_cert(chain, key).map_err(|error| {
                unusable("--daemon-cert", format!("a certificate that goes with --daemon-key ({error})"))
            })?
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let host = endpoint.host().unwrap_or_default().to_owned();
    let name = ServerName::try_from(host);
    let name = name
        .map_err(|error| unusable("--daemon", format!("https:// with a host name or address ({error})")))?;
    Ok(Tls { connector: Arc::new(config).into(), name })
}

/// At least one.
fn certificates(flag: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Unusable> {
    let bad = |error: String| unusable(flag, format!("a PEM file with certificates ({error})"));
    let all = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let all = all.map_err(|error| bad(error.to_string()))?;
    if all.is_empty() { Err(bad("there is none in it".to_owned())) } else { Ok(all) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str, files: &DaemonFiles) -> String {
        let Unusable { flag, must_be } = Daemon::parse(text, files).unwrap_err();
        format!("{flag} {must_be}")
    }

    fn token(mode: u32, text: &str) -> (tempfile::TempDir, DaemonFiles) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        (dir, DaemonFiles { token: Some(path), ..Default::default() })
    }

    #[test]
    fn a_token_is_never_sent_where_others_can_read_it() {
        let (_dir, files) = token(0o600, "secret\n");
        for text in ["http://127.0.0.1:1", "http://[::1]:1", "http://localhost:1"] {
            let daemon = Daemon::parse(text, &files).unwrap();
            assert_eq!(daemon.request(()).metadata().get("authorization").unwrap(), "Bearer secret");
            assert!(!format!("{daemon:?} {:?}", daemon.request(()).metadata()).contains("secret"));
        }
        for text in ["http://node-7:1", "http://10.0.0.1:1", "http://localhost.example:1"] {
            assert!(refused(text, &files).starts_with("--daemon-token-file given only with https"), "{text}");
        }
        assert!(refused("unix:/run/kvbm.sock", &files).contains("over TCP"));
        let (_dir, files) = token(0o644, "secret\n");
        assert!(refused("http://localhost:1", &files).contains("its mode is 644"));
        let (_dir, files) = token(0o600, "two words\n");
        assert!(refused("http://localhost:1", &files).contains("one line"));
    }

    #[test]
    fn files_that_do_not_go_together_are_refused() {
        let files = |ca, cert, key| DaemonFiles { ca, cert, key, token: None };
        let path = || Some(PathBuf::from("/none"));
        assert!(refused("https://h:1", &files(None, None, None)).starts_with("--daemon-ca given with https"));
        assert!(refused("https://h:1", &files(path(), None, None)).starts_with("--daemon-ca a PEM file"));
        assert!(refused("http://h:1", &files(path(), None, None)).starts_with("--daemon-ca given only with"));
        assert!(
            refused("http://h:1", &files(None, path(), None)).starts_with("--daemon-cert given only with")
        );
        for text in ["ftp://h:1", "https://h", "https://h:1/x", "h:1", ""] {
            assert!(refused(text, &files(None, None, None)).starts_with("--daemon unix:/path,"), "{text}");
        }
    }

    #[test]
    fn what_a_remote_daemon_lists_may_be_out_of_reach() {
        let daemon = |text| Daemon::parse(text, &DaemonFiles::default()).unwrap();
        let worker = |text| Endpoint::parse(text).unwrap();
        let (near, far) = (daemon("http://127.0.0.1:1"), daemon("http://node-7:1"));
        for remote in [&near, &far] {
            assert!(remote.hides(&worker("unix:/run/w.sock")).unwrap().contains("Unix socket"));
            assert_eq!(remote.hides(&worker("http://node-7:9")), None);
        }
        assert!(far.hides(&worker("http://127.0.0.1:9")).unwrap().contains("loopback"));
        assert_eq!(near.hides(&worker("http://127.0.0.1:9")), None);
        let own = Daemon::at_socket("/run/kvbm.sock".into());
        assert_eq!(own.hides(&worker("unix:/run/w.sock")), None);
    }
}
