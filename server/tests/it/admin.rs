//! The pages of the admin HTTP server.

use kvbm_proto::v1;
use kvbm_server::Daemon;
use kvbm_server::status::{Status, render};

use crate::client::{Client, keys};
use crate::rig::{Rig, config};

#[tokio::test(flavor = "multi_thread")]
async fn pages_say_what_the_daemon_is_doing() {
    let rig = Rig::start(&[]).await;
    let mut client = Client::attach(rig.socket()).await;
    let (namespace, pool) = (client.namespace().await, client.pool(4).await);
    client.store(namespace, &pool, &keys(0, 2)).await;
    for path in ["/live", "/health", "/ready"] {
        assert_eq!(rig.get(path).await.0, 200, "{path}");
    }
    let (code, metrics) = rig.get("/metrics").await;
    assert_eq!(code, 200);
    for line in metrics.lines().filter(|line| !line.starts_with('#')) {
        let family = line.split(['{', ' ']).next().unwrap();
        let family =
            ["_bucket", "_sum", "_count"].iter().find_map(|end| family.strip_suffix(end)).unwrap_or(family);
        assert!(metrics.contains(&format!("# HELP {family} ")), "{line}");
    }
    let (code, page) = rig.get("/status").await;
    let status: Status = serde_json::from_str(&page).unwrap();
    assert_eq!((code, status.schema, status.daemon.ready), (200, 1, true));
    let tiers: Vec<_> = status.tiers.iter().map(|tier| (tier.tier.as_str(), tier.state.as_str())).collect();
    assert_eq!(tiers, [("device", "on"), ("host", "on"), ("disk", "off")]);
    assert!(!status.tiers[2].reason.is_empty());
    assert_eq!((status.pools[0].session, status.pools[0].mode.as_str()), (Some(client.session), "owned"));
    assert_eq!(status.pools[0].slots.pinned, 2);
    assert_eq!(status.namespaces[0].tenant, "t");
    let reply = rig.registry().await.status(v1::StatusRequest {}).await.unwrap().into_inner();
    let same: Status = serde_json::from_str(&reply.json).unwrap();
    assert_eq!((same.pools, same.tiers), (status.pools.clone(), status.tiers.clone()));
    assert!(render(&status).contains("device  on"), "{}", render(&status));
    assert_eq!(rig.get("/nothing").await.0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_port_gives_way_to_the_next_and_metrics_can_be_off() {
    let rig = Rig::start(&[]).await;
    let port = rig.daemon.addresses().admin.port();
    let dir = tempfile::tempdir().unwrap();
    let settings = [
        ("metrics_port", port.to_string()),
        ("metrics", "false".to_owned()),
        ("disk_cache_gb", "0.05".to_owned()),
    ];
    let settings = settings.each_ref().map(|(key, value)| (*key, value.as_str()));
    let other = Rig { daemon: Daemon::start(config(dir.path(), &settings)).await.unwrap(), dir };
    assert!(other.daemon.addresses().admin.port() > port);
    assert_eq!(other.get("/metrics").await.0, 404);
    assert_eq!(other.get("/live").await.0, 200);
    let disk = other.daemon.status().tiers[2].clone();
    assert!(["opening", "on"].contains(&disk.state.as_str()), "{disk:?}");
}
