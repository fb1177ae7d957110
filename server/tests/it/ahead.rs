//! What frontends ask before a request: blocks kept for another worker, and blocks brought from disk.

use kvbm_proto::pack_keys;
use kvbm_proto::v1;
use tonic::Code;

use crate::client::{Client, DIGEST, keys};
use crate::rig::Rig;

fn hand_over(keys: &[[u8; 16]], wait_ms: u32, lease_ms: u32) -> v1::HandOverRequest {
    v1::HandOverRequest { namespace_digest: DIGEST.to_vec(), keys: pack_keys(keys), wait_ms, lease_ms }
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_are_kept_from_the_moment_they_come_until_they_are_let_go() {
    let rig = Rig::start(&[("cpu_cache_blocks", "8")]).await;
    let mut client = Client::attach(rig.socket()).await;
    let (namespace, pool) = (client.namespace().await, client.pool(8).await);
    let mut registry = rig.registry().await;
    // Asked for before they are there, as a worker's own message may come later than the frontend's.
    let asked = tokio::spawn({
        let mut registry = registry.clone();
        async move { registry.hand_over(hand_over(&keys(0, 2), 30_000, 60_000)).await }
    });
    let blocks = client.store(namespace, &pool, &keys(0, 2)).await;
    client.release(pool.id, &blocks).await;
    let reply = asked.await.unwrap().unwrap().into_inner();
    assert_eq!(reply.host_blocks, 2);
    assert_ne!(reply.pin_id, 0);
    for sequence in 1..11 {
        let blocks = client.store(namespace, &pool, &keys(sequence, 2)).await;
        client.release(pool.id, &blocks).await;
    }
    let again = registry.hand_over(hand_over(&keys(0, 2), 0, 1)).await.unwrap().into_inner();
    assert_eq!(again.host_blocks, 2, "they outlived a flood");
    for _ in 0..2 {
        registry.end_hand_over(v1::EndHandOverRequest { pin_id: reply.pin_id }).await.unwrap();
    }
    rig.until("let go of", |status| status.pins.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_waits_in_vain_is_answered_in_time_and_leaves_what_it_has() {
    let rig = Rig::start(&[]).await;
    let mut client = Client::attach(rig.socket()).await;
    let (namespace, pool) = (client.namespace().await, client.pool(8).await);
    let blocks = client.store(namespace, &pool, &keys(0, 2)).await;
    client.release(pool.id, &blocks).await;
    let mut registry = rig.registry().await;
    let reply = registry.hand_over(hand_over(&keys(0, 4), 20, 300)).await.unwrap().into_inner();
    assert_eq!(reply.host_blocks, 2);
    rig.until("over by its time", |status| status.pins.is_empty()).await;
    // A client that leaves knows no pin that it could end.
    let left = tokio::time::timeout(
        std::time::Duration::from_millis(50),
        registry.hand_over(hand_over(&keys(0, 4), 30_000, 600_000)),
    );
    assert!(left.await.is_err());
    rig.until("left", |status| status.pins.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_unknown_or_malformed_is_refused() {
    let rig = Rig::start(&[]).await;
    let mut client = Client::attach(rig.socket()).await;
    client.namespace().await;
    let mut registry = rig.registry().await;
    let prefetch =
        |digest: &[u8], keys: Vec<u8>| v1::PrefetchKeysRequest { namespace_digest: digest.to_vec(), keys };
    let good = pack_keys(&keys(0, 2));
    let reply = registry.prefetch_keys(prefetch(&DIGEST, good.clone())).await.unwrap().into_inner();
    assert_eq!((reply.host_blocks, reply.promoting_blocks), (0, 0));
    for (message, code) in [
        (prefetch(&[9; 32], good.clone()), Code::NotFound),
        (prefetch(&[9; 31], good.clone()), Code::InvalidArgument),
        (prefetch(&DIGEST, good[1..].to_vec()), Code::InvalidArgument),
        (prefetch(&DIGEST, vec![]), Code::InvalidArgument),
    ] {
        assert_eq!(registry.prefetch_keys(message).await.unwrap_err().code(), code);
    }
    let unknown = v1::HandOverRequest { namespace_digest: vec![9; 32], ..hand_over(&keys(0, 1), 0, 0) };
    assert_eq!(registry.hand_over(unknown).await.unwrap_err().code(), Code::NotFound);
}
