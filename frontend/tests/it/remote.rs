//! A daemon on another machine: TLS both ways, a token, and workers that may be out of reach.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use http::StatusCode;
use kvbm_frontend::{Config, Daemon, DaemonFiles};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::json;
use tonic::transport::{Certificate, Identity, ServerTlsConfig};

use crate::client::post;
use crate::frontend::{Frontend, config};
use crate::mock::{MockDaemon, MockWorker, say};

/// Signs certificates into files.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::new(Vec::new()).unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = parameters.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(parameters, key), pem }
    }

    /// Certificate and key.
    fn sign(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let parameters = CertificateParams::new(vec![name.to_owned()]).unwrap();
        (parameters.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }
}

fn file(folder: &Path, name: &str, text: &str) -> Option<PathBuf> {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    Some(path)
}

#[tokio::test]
async fn workers_of_a_remote_daemon_are_served_if_they_can_be_reached() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let (certificate, key) = authority.sign("localhost");
    let tls = ServerTlsConfig::new()
        .identity(Identity::from_pem(certificate, key))
        .client_ca_root(Certificate::from_pem(&authority.pem));
    let near = MockWorker::start(folder.path(), "near", "tiny", say(" x"));
    let far = MockWorker::start_tcp("far", say(" x"));
    let (daemon, port, mut refused) =
        MockDaemon::start_tls(vec![near.entry(), far.entry()], tls, "Bearer right");

    let (certificate, key) = authority.sign("frontend");
    let files = |token: &str| DaemonFiles {
        ca: file(folder.path(), "ca.pem", &authority.pem),
        token: file(folder.path(), token, token),
        cert: file(folder.path(), "cert.pem", &certificate),
        key: file(folder.path(), "key.pem", &key),
    };
    let address = format!("https://localhost:{port}");
    let of = async |files: &DaemonFiles| {
        let daemons = vec![Daemon::parse(&address, files).unwrap()];
        Frontend::start(Config { daemons, ..config() }).await
    };
    let frontend = of(&files("right")).await;
    frontend
        .until_workers(|workers| matches!(workers, [one] if one["id"] == "far" && one["state"] == "ready"))
        .await;
    let request = json!({ "model": "tiny", "prompt": "Once" });
    assert_eq!(post(frontend.address, "/v1/completions", request).await.status, StatusCode::OK);
    assert_eq!((near.requests().len(), far.requests().len(), *refused.borrow()), (0, 1, 0));
    // The list is followed.
    let more = MockWorker::start_tcp("more", say(" x"));
    daemon.set(vec![near.entry(), far.entry(), more.entry()]);
    frontend.until_ready(2).await;

    // Without the token there is nothing to serve.
    let _without_token = of(&files("wrong")).await;
    refused.wait_for(|count| *count > 0).await.unwrap();
}
