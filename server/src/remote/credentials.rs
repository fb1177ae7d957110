//! What protects the TCP port: certificate, clients' authority and token. Read and checked as a whole, before any port
//! is bound.

use std::fs::File;
use std::io::Read;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use thiserror::Error;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use crate::Config;

/// Shorter tokens could be guessed.
const TOKEN_BYTES_MIN: usize = 16;
const TOKEN_BYTES_MAX: usize = 4096;

/// A setting that does not go with the others, or with what is in its file.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("invalid {key}: permitted is {permitted}")]
pub struct Misfit {
    /// Key of the setting.
    pub key: &'static str,
    /// In words.
    pub permitted: String,
}

fn misfit(key: &'static str, permitted: impl Into<String>) -> Misfit {
    Misfit { key, permitted: permitted.into() }
}

/// At least one of certificates of clients (in `tls`) and a token is demanded.
pub(crate) struct Credentials {
    pub tls: Option<TlsAcceptor>,
    pub token: Option<Token>,
}

impl Credentials {
    /// `None` if no port is to be opened.
    pub fn read(config: &Config) -> Result<Option<(SocketAddr, Self)>, Misfit> {
        let Some(listen) = config.grpc_listen else { return Ok(None) };
        let tls = match (&config.grpc_tls_cert, &config.grpc_tls_key) {
            (Some(certificate), Some(key)) => {
                Some(acceptor(certificate, key, config.grpc_tls_client_ca.as_deref())?)
            }
            (Some(_), None) => {
                return Err(misfit("grpc_tls_cert", "a certificate together with grpc_tls_key"));
            }
            (None, Some(_)) => return Err(misfit("grpc_tls_key", "a key together with grpc_tls_cert")),
            (None, None) => None,
        };
        if tls.is_none() && config.grpc_tls_client_ca.is_some() {
            let permitted = "an authority together with grpc_tls_cert and grpc_tls_key";
            return Err(misfit("grpc_tls_client_ca", permitted));
        }
        if tls.is_none() && !listen.ip().is_loopback() {
            let permitted = "a loopback address, unless grpc_tls_cert and grpc_tls_key are set";
            return Err(misfit("grpc_listen", permitted));
        }
        if config.grpc_token_file.is_none() && config.grpc_tls_client_ca.is_none() {
            let permitted = if tls.is_some() {
                "an address together with grpc_token_file or grpc_tls_client_ca"
            } else {
                "an address together with grpc_token_file"
            };
            return Err(misfit("grpc_listen", permitted));
        }
        let token = config.grpc_token_file.as_deref().map(Token::read).transpose();
        let token = token.map_err(|permitted| misfit("grpc_token_file", permitted))?;
        Ok(Some((listen, Self { tls, token })))
    }
}

/// What requests must carry. Only its digest is kept.
#[derive(Clone)]
pub(crate) struct Token(blake3::Hash);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token")
    }
}

impl Token {
    /// What changes over admin HTTP must show; `None` if nothing is configured.
    pub fn for_admin(config: &Config) -> Result<Option<Self>, Misfit> {
        let token = config.admin_token_file.as_deref().map(Self::read).transpose();
        token.map_err(|permitted| misfit("admin_token_file", permitted))
    }

    /// Fails with what is permitted.
    fn read(path: &Path) -> Result<Self, String> {
        let unreadable = |error| format!("a file that can be read ({error})");
        let file = File::open(path).map_err(unreadable)?;
        let metadata = file.metadata().map_err(unreadable)?;
        if !metadata.is_file() {
            return Err("a regular file".to_owned());
        }
        let mode = metadata.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(format!(
                "a file that group and others cannot read (its mode is {mode:03o}, not 600 or 400)"
            ));
        }
        let mut text = Vec::new();
        // One byte more than a token and the end of its line have.
        file.take(TOKEN_BYTES_MAX as u64 + 3).read_to_end(&mut text).map_err(unreadable)?;
        let text = text.strip_suffix(b"\n").unwrap_or(&text);
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        let usable = (TOKEN_BYTES_MIN..=TOKEN_BYTES_MAX).contains(&text.len())
            && text.iter().all(u8::is_ascii_graphic);
        if !usable {
            return Err(format!(
                "a file with one line of {TOKEN_BYTES_MIN} to {TOKEN_BYTES_MAX} printable characters without spaces"
            ));
        }
        Ok(Self(blake3::hash(text)))
    }

    /// Whether the value of an `authorization` header bears it. Takes the same time wherever they differ: digests are
    /// compared, and those in constant time.
    pub fn is_in(&self, header: &[u8]) -> bool {
        const SCHEME: &[u8] = b"Bearer ";
        let Some((scheme, token)) = header.split_at_checked(SCHEME.len()) else { return false };
        scheme.eq_ignore_ascii_case(SCHEME) && blake3::hash(token) == self.0
    }
}

/// TLS 1.3 only: its clients are this project's, and gRPC libraries.
fn acceptor(certificate: &Path, key: &Path, client_ca: Option<&Path>) -> Result<TlsAcceptor, Misfit> {
    let chain = certificates("grpc_tls_cert", certificate)?;
    let key = PrivateKeyDer::from_pem_file(key)
        .map_err(|error| misfit("grpc_tls_key", format!("a PEM file with a private key ({error})")))?;
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13])
        .expect("ring has all that TLS 1.3 needs");
    let builder = match client_ca {
        Some(path) => builder.with_client_cert_verifier(verifier(path, provider)?),
        None => builder.with_no_client_auth(),
    };
    let mut tls = builder.with_single_cert(chain, key).map_err(|error| {
        misfit("grpc_tls_cert", format!("a certificate that goes with grpc_tls_key ({error})"))
    })?;
    tls.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(tls).into())
}

fn verifier(path: &Path, provider: Arc<CryptoProvider>) -> Result<Arc<dyn ClientCertVerifier>, Misfit> {
    const KEY: &str = "grpc_tls_client_ca";
    let unusable = |error: &dyn std::fmt::Display| {
        misfit(KEY, format!("a PEM file with certificates of authorities ({error})"))
    };
    let mut roots = RootCertStore::empty();
    for authority in certificates(KEY, path)? {
        roots.add(authority).map_err(|error| unusable(&error))?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
    verifier.map_err(|error| unusable(&error))
}

/// At least one.
fn certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Misfit> {
    let unusable = |error: String| misfit(key, format!("a PEM file with certificates ({error})"));
    let all = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let all = all.map_err(|error| unusable(error.to_string()))?;
    if all.is_empty() { Err(unusable("there is none in it".to_owned())) } else { Ok(all) }
}
