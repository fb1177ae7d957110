//! What is shown to members that are spoken to over TLS, and who vouches for them: named by the variables that clients of
//! etcd know.

use std::path::PathBuf;

use tonic::transport::{Certificate, ClientTlsConfig, Identity};

/// Files, read at each connection: they may be renewed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct TlsFiles {
    ca: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
}

impl TlsFiles {
    /// `ETCD_AUTH_CA`, without which those count that this machine trusts; `ETCD_AUTH_CLIENT_CERT` and
    /// `ETCD_AUTH_CLIENT_KEY`, if members demand a certificate.
    pub(crate) fn of_environment() -> Self {
        let file = |name| std::env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from);
        Self {
            ca: file("ETCD_AUTH_CA"),
            cert: file("ETCD_AUTH_CLIENT_CERT"),
            key: file("ETCD_AUTH_CLIENT_KEY"),
        }
    }

    pub(crate) fn read(&self) -> Result<ClientTlsConfig, String> {
        let read =
            |path: &PathBuf| std::fs::read(path).map_err(|error| format!("read {}: {error}", path.display()));
        let config = match &self.ca {
            Some(path) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(path)?)),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        match (&self.cert, &self.key) {
            (None, None) => Ok(config),
            (Some(cert), Some(key)) => Ok(config.identity(Identity::from_pem(read(cert)?, read(key)?))),
            _ => Err("ETCD_AUTH_CLIENT_CERT and ETCD_AUTH_CLIENT_KEY go together".to_owned()),
        }
    }
}
