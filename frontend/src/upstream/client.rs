//! The HTTP client for other servers, with and without TLS.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::error::FrontendError;

pub(super) type HttpClient = Client<HttpsConnector<HttpConnector>, Body>;

const CONNECT_DEADLINE: Duration = Duration::from_secs(2);

/// Servers with TLS must be vouched for by an authority in the PEM file `ca`, or, without one, by one that this machine
/// trusts.
pub(super) fn client(ca: Option<&Path>) -> Result<HttpClient, FrontendError> {
    let roots = match ca {
        Some(path) => authorities(path).map_err(|reason| FrontendError::Daemon {
            flag: "--upstream-ca",
            value: path.display().to_string(),
            must_be: format!("a PEM file of authorities ({reason})"),
        })?,
        // A machine that trusts nobody reaches servers without TLS all the same.
        None => {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            roots
        }
    };
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring has all that TLS needs")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(CONNECT_DEADLINE));
    connector.enforce_http(false);
    let connector = HttpsConnectorBuilder::new()
        .with_tls_config(config)
        .https_or_http()
        .enable_http1()
        .wrap_connector(connector);
    Ok(Client::builder(TokioExecutor::new()).build(connector))
}

/// At least one.
fn authorities(path: &Path) -> Result<RootCertStore, String> {
    let all = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let mut roots = RootCertStore::empty();
    for authority in all.map_err(|error| error.to_string())? {
        roots.add(authority).map_err(|error| error.to_string())?;
    }
    if roots.is_empty() { Err("there is none in it".to_owned()) } else { Ok(roots) }
}
