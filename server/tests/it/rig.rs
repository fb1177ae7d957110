//! A daemon in a directory of its own.

use std::path::Path;
use std::time::{Duration, Instant};

use kvbm_proto::v1::registry_client::RegistryClient;
use kvbm_server::config::{Environment, load};
use kvbm_server::status::Status;
use kvbm_server::{Config, Daemon, DaemonArgs};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::transport::Channel;

use crate::client::channel;

pub struct Rig {
    pub dir: tempfile::TempDir,
    pub daemon: Daemon,
}

pub fn config(dir: &Path, settings: &[(&str, &str)]) -> Config {
    let args = DaemonArgs::default()
        .with("state_dir", dir.to_str().unwrap())
        .with("metrics_port", "0")
        .with("cpu_cache_gb", "0.02");
    let args = settings.iter().fold(args, |args, (key, value)| args.with(key, *value));
    load(&args, &Environment::default()).unwrap().config
}

impl Rig {
    pub async fn start(settings: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let daemon = Daemon::start(config(dir.path(), settings)).await.unwrap();
        let rig = Self { dir, daemon };
        rig.until("ready", |status| status.daemon.ready && status.tiers[1].state != "populating").await;
        rig
    }

    pub fn socket(&self) -> &Path {
        &self.daemon.addresses().socket
    }

    pub async fn registry(&self) -> RegistryClient<Channel> {
        RegistryClient::new(channel(self.socket()).await)
    }

    /// Looks until it is so, or fails after a long time.
    pub async fn until(&self, what: &str, is_so: impl Fn(&Status) -> bool) -> Status {
        let started = Instant::now();
        loop {
            let status = self.daemon.status();
            if is_so(&status) {
                return status;
            }
            assert!(started.elapsed() < Duration::from_secs(30), "never {what}: {status:#?}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Code and body of an admin page.
    pub async fn get(&self, path: &str) -> (u16, String) {
        self.send("GET", path, None, "").await
    }

    /// Code and body of the answer to a request with a body of JSON, with a token or without.
    pub async fn send(&self, method: &str, path: &str, token: Option<&str>, body: &str) -> (u16, String) {
        let mut address = self.daemon.addresses().admin;
        address.set_ip([127, 0, 0, 1].into());
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let token = token.map_or_else(String::new, |token| format!("authorization: Bearer {token}\r\n"));
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: kvbm\r\nconnection: close\r\n{token}content-type: application/json\r\n\
             content-length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    /// Value of one sample.
    pub fn metric(&self, sample: &str) -> f64 {
        let text = self.daemon.metrics();
        let line = text.lines().find(|line| line.rsplit_once(' ').is_some_and(|(name, _)| name == sample));
        line.unwrap_or_else(|| panic!("no {sample} in {text}")).rsplit_once(' ').unwrap().1.parse().unwrap()
    }
}
