//! Two nodes that find each other through etcd, which is stopped and started again.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kvbm_tests::{
    DaemonOptions, Frontend, Node, Random, WorkerOptions, eventually, eventually_within, get_any, program,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};

use super::servers::{Server, etcd_is_there, free_ports};

#[test]
fn nodes_come_and_go_through_etcd_and_its_loss_disturbs_nobody() {
    if !etcd_is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let port = free_ports();
    let place = format!("etcd://127.0.0.1:{port}");
    let etcd = Server::etcd(folder.path(), port);
    let token = folder.path().join("token");
    std::fs::write(&token, "secret-of-the-test\n").unwrap();
    std::fs::set_permissions(&token, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let token = token.to_str().unwrap();
    let options = DaemonOptions { host_mb: 64.0, arguments: vec![] }.and(&[
        "--grpc-listen",
        "127.0.0.1:0",
        "--grpc-token-file",
        token,
        "--announce",
        &place,
    ]);
    let start = || {
        let node = Node::start(options.clone());
        let listen = ["--listen", "http://127.0.0.1:0", "--threads", "1"].map(String::from).to_vec();
        let worker = node.worker_at_own_address(
            "worker",
            &WorkerOptions { arguments: listen, ..WorkerOptions::default() },
        );
        (node, worker)
    };
    let (first, second) = (start(), start());
    let arguments = ["--discovery", &place, "--daemon-token-file", token, "--router-mode", "kv"];
    let frontend = Frontend::start(folder.path(), &[], &arguments);
    frontend.until_ready(2);
    let ask = || {
        let body = json!({ "model": "tiny", "prompt": Random::new(1).tokens(70), "max_tokens": 4, "temperature": 0 });
        let (status, answer) = frontend.complete(&body);
        assert_eq!(status, 200, "{answer}");
    };
    ask();
    // Nobody needs it to serve.
    drop(etcd);
    ask();
    let _etcd = Server::etcd(folder.path(), port);
    ask();
    // What changes afterwards is seen again: longer than a key outlives its daemon.
    drop(second);
    let workers = || {
        let health: Value = serde_json::from_str(&get_any(&frontend.url("/health")).1).unwrap();
        health["workers"].as_array().unwrap().len()
    };
    eventually_within(Duration::from_secs(60), "the dead node is forgotten", || {
        (workers() == 1).then_some(())
    });
    ask();
    let _third = start();
    frontend.until_ready(2);
    drop(first);
    ask();
}

/// Writes what an authority signs for `name` into `NAME.pem` and `NAME.key`; the authority itself is `ca.pem`.
fn certificates(folder: &Path, names: &[&str]) {
    let key = KeyPair::generate().unwrap();
    let mut parameters = CertificateParams::new(Vec::new()).unwrap();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    std::fs::write(folder.join("ca.pem"), parameters.self_signed(&key).unwrap().pem()).unwrap();
    let issuer = Issuer::new(parameters, key);
    for name in names {
        let key = KeyPair::generate().unwrap();
        let signed =
            CertificateParams::new(vec![(*name).to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
        std::fs::write(folder.join(format!("{name}.pem")), signed.pem()).unwrap();
        std::fs::write(folder.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
}

#[test]
fn models_are_listed_added_and_removed_in_an_etcd_with_tls_that_demands_a_certificate() {
    if !etcd_is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    certificates(folder.path(), &["127.0.0.1", "client"]);
    let file = |name: &str| folder.path().join(name).display().to_string();
    let port = free_ports();
    let (ca, cert, key) = (file("ca.pem"), file("127.0.0.1.pem"), file("127.0.0.1.key"));
    let arguments =
        ["--trusted-ca-file", &ca, "--cert-file", &cert, "--key-file", &key, "--client-cert-auth"];
    let _etcd = Server::etcd_with(folder.path(), port, "https", &arguments);
    let place = format!("etcds://127.0.0.1:{port}");
    let models = |arguments: &[&str], client: Option<&str>| {
        let mut command = Command::new(program());
        command.args(["models", "--discovery", &place]).args(arguments).env("ETCD_AUTH_CA", &ca);
        if let Some(name) = client {
            command.env("ETCD_AUTH_CLIENT_CERT", file(&format!("{name}.pem")));
            command.env("ETCD_AUTH_CLIENT_KEY", file(&format!("{name}.key")));
        }
        command.output().unwrap()
    };
    let url = "https://far.example:8443";
    eventually("the server is listed", || {
        models(&["add", url], Some("client")).status.success().then_some(())
    });
    let again = models(&["add", url], Some("client"));
    assert!(String::from_utf8_lossy(&again.stderr).contains("already"), "{again:?}");
    assert!(!models(&["list"], None).status.success(), "a certificate was demanded");
    let listed = |client| {
        let output = models(&["list"], client);
        serde_json::from_slice::<Value>(&output.stdout).unwrap()["upstreams"].clone()
    };
    assert_eq!(listed(Some("client")), json!([url]));
    assert!(models(&["remove", url], Some("client")).status.success());
    assert_eq!(listed(Some("client")), json!([]));
}
