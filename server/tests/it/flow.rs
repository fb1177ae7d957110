//! Blocks out and back: offload, match, onboard, with the bytes looked at and the metrics reconciled.

use kvbm_proto::pack_keys;
use kvbm_proto::v1::{self, Refusal, client_message::Body as Ask, server_message::Body};

use crate::client::{BLOCK_BYTES, Client, Pool, TOKENS_PER_BLOCK, commit, content, keys};
use crate::rig::Rig;

/// Brings a sequence from host memory into a pool and checks every byte.
async fn onboard(client: &mut Client, namespace: u32, pool: &Pool, keys: &[[u8; 16]]) -> Vec<v1::BlockRef> {
    let found = client.find(namespace, pool.id, keys).await;
    assert_eq!((found.device.len(), found.host_blocks as usize), (0, keys.len()));
    assert!(found.lease_id > 0 && found.lease_ms > 0);
    let targets = client.grants(pool.id, keys.len() as u32).await;
    let body = v1::Onboard {
        lease_id: found.lease_id,
        pool_id: pool.id,
        targets: targets.clone(),
        ..Default::default()
    };
    let done = client.transfer(Ask::Onboard(body)).await;
    assert_eq!((done.blocks_done as usize, done.blocks_failed), (keys.len(), 0), "{done:?}");
    assert_eq!(done.bytes as usize, keys.len() * BLOCK_BYTES);
    for (target, key) in targets.iter().zip(keys) {
        let mut seen = vec![0; BLOCK_BYTES];
        pool.memory.memory().read(pool.memory.layout().offset(target.block), &mut seen);
        assert!(seen == content(key), "block {target:?} has other bytes");
    }
    targets
}

async fn out_and_back(rig: &Rig) {
    let (mut first, mut second) = (Client::attach(rig.socket()).await, Client::attach(rig.socket()).await);
    let (namespace, pool) = (first.namespace().await, first.pool(8).await);
    let (four, two) = (keys(0, 4), keys(1, 2));
    first.store(namespace, &pool, &four).await;
    first.store(namespace, &pool, &two).await;

    assert_eq!(second.namespace().await, namespace, "one digest, one namespace");
    let other = second.pool(6).await;
    assert_ne!(other.id, pool.id);
    onboard(&mut second, namespace, &other, &four).await;
    onboard(&mut second, namespace, &other, &two).await;
    // Now they are on the device, and pinned once more.
    let found = second.find(namespace, other.id, &four).await;
    assert_eq!((found.device.len(), found.host_blocks, found.lease_id), (4, 0, 0));

    let (blocks, bytes) = (6.0, 6.0 * BLOCK_BYTES as f64);
    assert_eq!(rig.metric("kvbm_offload_blocks_d2h"), blocks);
    assert_eq!(rig.metric("kvbm_onboard_blocks_h2d"), blocks);
    assert_eq!(rig.metric("kvbm_transfer_bytes_total{route=\"d2h\"}"), bytes);
    assert_eq!(rig.metric("kvbm_transfer_bytes_total{route=\"h2d\"}"), bytes);
    assert_eq!(rig.metric("kvbm_matched_tokens"), blocks * f64::from(TOKENS_PER_BLOCK));
    assert_eq!(rig.metric("kvbm_host_cache_hit_rate"), 1.0);
    assert_eq!(rig.metric("kvbm_tier_resident_blocks{tier=\"host\"}"), blocks);
    assert_eq!(rig.metric("kvbm_tier_resident_blocks{tier=\"device\"}"), 2.0 * blocks);
    assert_eq!(rig.metric("kvbm_sessions"), 2.0);
    assert_eq!(rig.metric("kvbm_leases"), 0.0);
    assert_eq!(rig.metric("kvbm_quarantined_blocks"), 0.0);
    assert_eq!(rig.metric("kvbm_evictions_total{tier=\"device\"}"), 0.0);
    let copied = rig.metric("kvbm_transfer_seconds_count{route=\"h2d\"}");
    assert_eq!(copied, rig.metric("kvbm_transfer_seconds_bucket{route=\"h2d\",le=\"+Inf\"}"));
    assert_eq!(copied, 2.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_come_back_as_they_were_and_the_metrics_say_so() {
    out_and_back(&Rig::start(&[]).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_works_with_every_queue_at_length_one() {
    let ones = [("queue_depth", "1"), ("batch_blocks", "1"), ("session_queue_depth", "1")];
    let rig = Rig::start(&ones).await;
    let mut client = Client::attach(rig.socket()).await;
    let (namespace, pool) = (client.namespace().await, client.pool(8).await);
    let four = keys(0, 4);
    client.store(namespace, &pool, &four).await;
    // Many questions at once, more than there are places for answers.
    let mut ids = Vec::new();
    for _ in 0..50 {
        ids.push(client.stream.send(Ask::Ping(v1::Ping {})).await);
    }
    for id in ids {
        assert_eq!(client.stream.next().await.unwrap().unwrap().id, id);
    }
    let mut other = Client::attach(rig.socket()).await;
    let other_namespace = other.namespace().await;
    let small = other.pool(4).await;
    onboard(&mut other, other_namespace, &small, &four).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefetch_is_answered_at_once_or_when_it_has_arrived() {
    // Waiting takes no place from other answers, so the order of answers is open: each is asked alone.
    let rig = Rig::start(&[("session_queue_depth", "1")]).await;
    let mut client = Client::attach(rig.socket()).await;
    let (namespace_id, pool) = (client.namespace().await, client.pool(8).await);
    client.store(namespace_id, &pool, &keys(0, 3)).await;
    for wait in [false, true, true] {
        let prefetch = v1::Prefetch { namespace_id, keys: pack_keys(&keys(0, 4)), wait };
        let reply = v1::PrefetchReply { host_blocks: 3, promoting_blocks: 0 };
        assert_eq!(client.ask(Ask::Prefetch(prefetch)).await, Body::Prefetch(reply));
        client.sync().await;
        let unknown = v1::Prefetch { namespace_id: 99, keys: vec![0; 16], wait };
        assert_eq!(client.refused(Ask::Prefetch(unknown)).await.0, Refusal::Unknown);
        let malformed = v1::Prefetch { namespace_id, keys: vec![0; 15], wait };
        assert_eq!(client.refused(Ask::Prefetch(malformed)).await.0, Refusal::Invalid);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_size_in_blocks_is_made_of_the_first_pools_blocks() {
    let rig = Rig::start(&[("cpu_cache_blocks", "12")]).await;
    let before = rig.daemon.status();
    assert_eq!((before.tiers[1].state.as_str(), before.tiers[1].capacity_bytes), ("off", 0));
    let mut client = Client::attach(rig.socket()).await;
    let (namespace, pool) = (client.namespace().await, client.pool(4).await);
    rig.until("populated", |status| status.tiers[1].state == "on").await;
    client.store(namespace, &pool, &keys(0, 4)).await;
    let status = rig.daemon.status();
    assert_eq!(status.tiers[1].capacity_bytes, 12 * 8192);
    assert_eq!(status.tiers[1].used_bytes, 4 * 8192);
    assert_eq!(status.namespaces[0].resident_bytes["host"], 4 * 8192);
    assert_eq!(status.layouts[0].slot_bytes, 8192);
}

#[tokio::test(flavor = "multi_thread")]
async fn grants_end_when_everything_is_held_and_released_blocks_are_evicted() {
    let rig = Rig::start(&[]).await;
    let mut client = Client::attach(rig.socket()).await;
    let (namespace, pool) = (client.namespace().await, client.pool(4).await);
    let held = client.store(namespace, &pool, &keys(0, 3)).await;
    assert_eq!(client.grants(pool.id, 4).await.len(), 1);
    assert_eq!(client.grants(pool.id, 4).await.len(), 0);
    client.release(pool.id, &held).await;
    let again = client.grants(pool.id, 2).await;
    assert_eq!(again.len(), 2);
    assert!(
        again.iter().all(|block| held
            .iter()
            .any(|old| old.block == block.block && old.generation < block.generation))
    );
    assert_eq!(rig.metric("kvbm_evictions_total{tier=\"device\"}"), 2.0);
    let found = client.find(namespace, pool.id, &keys(0, 3)).await;
    assert_eq!((found.device.len(), found.host_blocks), (1, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_is_not_used_ends() {
    let rig = Rig::start(&[("lease_ms", "10")]).await;
    let mut client = Client::attach(rig.socket()).await;
    let (namespace, pool) = (client.namespace().await, client.pool(4).await);
    client.store(namespace, &pool, &keys(0, 2)).await;
    let found = client.find(namespace, 0, &keys(0, 2)).await;
    assert_eq!((found.host_blocks, found.lease_ms), (2, 10));
    rig.until("no lease", |status| status.leases == 0).await;
    let targets = client.grants(pool.id, 2).await;
    let onboard = v1::Onboard { lease_id: found.lease_id, pool_id: pool.id, targets, ..Default::default() };
    assert_eq!(client.refused(Ask::Onboard(onboard)).await.0, Refusal::Unknown);
    let again = client.find(namespace, 0, &keys(0, 2)).await;
    client.stream.send(Ask::ReleaseLease(v1::ReleaseLease { lease_id: again.lease_id, whole: false })).await;
    client.sync().await;
    assert_eq!(rig.daemon.status().leases, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_breaks_the_contract_is_refused_and_the_stream_goes_on() {
    let rig = Rig::start(&[]).await;
    let mut client = Client::attach(rig.socket()).await;
    let (namespace, pool) = (client.namespace().await, client.pool(4).await);
    let refused = client
        .refused(Ask::Match(v1::Match {
            namespace_id: 99,
            keys: vec![0; 16],
            pool_id: 0,
            ..Default::default()
        }))
        .await;
    assert_eq!(refused.0, Refusal::Unknown);
    let refused = client
        .refused(Ask::Match(v1::Match {
            namespace_id: namespace,
            keys: vec![0; 15],
            pool_id: 0,
            ..Default::default()
        }))
        .await;
    assert_eq!(refused, (Refusal::Invalid, "keys: 15 bytes, expected a multiple of 16".to_owned()));
    let refused = client
        .refused(Ask::Match(v1::Match {
            namespace_id: namespace,
            keys: vec![],
            pool_id: 7,
            ..Default::default()
        }))
        .await;
    assert_eq!(refused.0, Refusal::Unknown);
    let staged = v1::OpenPool { mode: v1::PoolMode::Staged.into(), ..crate::client::open_pool(4) };
    assert_eq!(client.refused(Ask::OpenPool(staged)).await.0, Refusal::Invalid);
    let huge = v1::OpenPool { block_bytes: 1 << 40, ..crate::client::open_pool(1024) };
    assert_eq!(client.refused(Ask::OpenPool(huge)).await.0, Refusal::Exhausted);
    for block_bytes in [0, 1 << 50, u64::MAX] {
        let impossible = v1::OpenPool { block_bytes, ..crate::client::open_pool(u32::MAX) };
        assert_eq!(client.refused(Ask::OpenPool(impossible)).await.0, Refusal::Invalid);
    }
    assert_eq!(client.refused(Ask::Hello(v1::Hello::default())).await.0, Refusal::Invalid);
    // Messages without an answer are refused under their own id.
    let blocks = client.grants(pool.id, 1).await;
    let stale = [v1::BlockRef { generation: 77, ..blocks[0] }];
    let refused = client.refused(Ask::Commit(commit(namespace, pool.id, &stale, &keys(0, 1)))).await;
    assert_eq!(refused.0, Refusal::Stale);
    let refused = client.refused(Ask::ReleaseLease(v1::ReleaseLease { lease_id: 5, whole: false })).await;
    assert_eq!(refused.0, Refusal::Unknown);
    let pins = v1::Release { pool_id: pool.id, blocks, pins: vec![] };
    assert_eq!(client.refused(Ask::Release(pins)).await.0, Refusal::Invalid);
    client.sync().await;
}
