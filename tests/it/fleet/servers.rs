//! etcd and NATS, as tests start and stop them. Tests are skipped where one is missing, unless `KVBM_TEST_ETCD` or
//! `KVBM_TEST_NATS` demands it.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// A server that does not outlive the test.
pub struct Server(Child);

impl Server {
    fn spawn(command: &mut Command) -> Self {
        Self(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    /// One member of etcd, with its data in a folder.
    pub fn etcd(folder: &Path, port: u16) -> Self {
        Self::etcd_with(folder, port, "http", &[])
    }

    /// The same with further arguments.
    pub fn etcd_with(folder: &Path, port: u16, scheme: &str, more: &[&str]) -> Self {
        let client = format!("{scheme}://127.0.0.1:{port}");
        let peer = format!("http://127.0.0.1:{}", port + 1);
        Self::spawn(
            Command::new("etcd")
                .args(more)
                .args(["--data-dir", folder.join("etcd").to_str().unwrap()])
                .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
                .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
                .args(["--initial-cluster", &format!("default={peer}"), "--unsafe-no-fsync"]),
        )
    }

    /// NATS with JetStream.
    pub fn nats(folder: &Path, port: u16) -> Self {
        Self::nats_with(folder, port, &[])
    }

    /// The same with further arguments.
    pub fn nats_with(folder: &Path, port: u16, more: &[&str]) -> Self {
        Self::spawn(
            Command::new("nats-server")
                .args(["--addr", "127.0.0.1", "--port", &port.to_string(), "--jetstream"])
                .args(["--store_dir", folder.join("nats").to_str().unwrap()])
                .args(more),
        )
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn is_there(program: &str, demanded: &str) -> bool {
    let there = Command::new(program).arg("--version").stdout(Stdio::null()).status().is_ok();
    assert!(there || std::env::var_os(demanded).is_none(), "there is no {program}");
    if !there {
        eprintln!("skipped: there is no {program}");
    }
    there
}

pub fn etcd_is_there() -> bool {
    is_there("etcd", "KVBM_TEST_ETCD")
}

pub fn nats_is_there() -> bool {
    is_there("nats-server", "KVBM_TEST_NATS")
}

/// Two neighbouring ports for a server that may be started again: nobody uses them now, and nobody is given them later who
/// asks for any port or makes a connection, for they are below those that the kernel gives out.
pub fn free_ports() -> u16 {
    const PORTS: std::ops::Range<u32> = 20_000..32_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let pair = std::process::id() + NEXT.fetch_add(1, Ordering::Relaxed);
        let port = (PORTS.start + 2 * pair % (PORTS.end - PORTS.start)) as u16;
        if (port..port + 2).all(|port| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok()) {
            return port;
        }
    }
}
