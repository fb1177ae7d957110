//! Hit rates by capacity, as operators see them.

use kvbm_server::status::render;

use crate::client::{Client, keys};
use crate::rig::Rig;

#[tokio::test(flavor = "multi_thread")]
async fn status_and_metrics_say_what_is_found_and_what_other_capacities_would_find() {
    let rig = Rig::start(&[]).await;
    let idle = rig.daemon.status();
    assert_eq!((idle.what_if.len(), idle.what_if[0].tier.as_str(), idle.what_if[0].blocks), (1, "host", 0));
    assert!(!rig.daemon.metrics().contains("kvbm_what_if_hit_rate{"), "nothing was asked, nothing is said");

    let mut client = Client::attach(rig.socket()).await;
    let (namespace, pool) = (client.namespace().await, client.pool(32).await);
    // Ten turns: each finds what the one before stored, and six that never come again.
    let whole = keys(0, 10);
    for turn in 1..=10 {
        let found = client.find(namespace, pool.id, &whole[..turn]).await;
        assert_eq!(found.device.len(), turn - 1);
        client.release(pool.id, &found.device).await;
        client.store_behind(namespace, &pool, &whole[..turn], turn - 1).await;
        if turn <= 6 {
            client.find(namespace, pool.id, &keys(turn as u8, 5)).await;
        }
    }
    let status = rig.until("looked at", |status| status.what_if[0].blocks == 85).await;
    let host = &status.what_if[0];
    assert_eq!((host.capacity_bytes, host.sampled), (status.tiers[1].capacity_bytes, 1.0));
    let now = 45.0 / 85.0;
    assert!((host.hit_rate - now).abs() < 1e-9, "{host:?}");
    // All of it fits: no other capacity would find more, and none less but a tiny one.
    for capacity in ["0.5", "1", "2", "4", "inf"] {
        assert!((host.estimates[capacity] - now).abs() < 1e-9, "{capacity}: {host:?}");
        let sample = format!("kvbm_what_if_hit_rate{{tier=\"host\",capacity=\"{capacity}\"}}");
        assert!((rig.metric(&sample) - now).abs() < 1e-9, "{sample}");
    }
    assert!((rig.metric("kvbm_what_if_measured_hit_rate{tier=\"host\"}") - now).abs() < 1e-9);
    assert_eq!(rig.metric("kvbm_what_if_unseen_total"), 0.0);
    assert!(render(&status).contains("\nhost: 53 % now; 2 x "), "{}", render(&status));
}

#[tokio::test(flavor = "multi_thread")]
async fn it_can_be_turned_off() {
    let rig = Rig::start(&[("what_if_window_secs", "0")]).await;
    assert!(rig.daemon.status().what_if.is_empty());
    assert!(!render(&rig.daemon.status()).contains("hit rate by capacity"));
}
