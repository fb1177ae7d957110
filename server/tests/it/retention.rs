//! What blocks are to be kept like, from the wire to what is done about it.

use kvbm_proto::pack_keys;
use kvbm_proto::v1::{self, Refusal, client_message::Body as Ask};

use crate::client::{Client, Pool, commit, content, keys};
use crate::rig::Rig;

fn run(blocks: u32, priority: u32) -> v1::RetentionRun {
    v1::RetentionRun { blocks, priority: Some(priority), duration_ms: None }
}

/// Fills blocks for these keys; they are not committed yet.
async fn filled(client: &mut Client, pool: &Pool, keys: &[[u8; 16]]) -> Vec<v1::BlockRef> {
    let blocks = client.grants(pool.id, keys.len() as u32).await;
    for (block, key) in blocks.iter().zip(keys) {
        pool.memory.memory().write(pool.memory.layout().offset(block.block), &content(key));
    }
    blocks
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_goes_to_host_up_to_its_first_block_below_the_least_priority() {
    let rig = Rig::start(&[("host_offload_prefix_min_priority", "50")]).await;
    let (mut client, mut other) = (Client::attach(rig.socket()).await, Client::attach(rig.socket()).await);
    let (namespace, pool) = (client.namespace().await, client.pool(16).await);
    assert_eq!(other.namespace().await, namespace);
    let of_priorities: [&[u32]; 4] = [&[80, 50, 49, 90], &[49, 100], &[50], &[]];
    let expected = [2, 0, 1, 0];
    for (sequence, (priorities, in_host)) in (0u8..).zip(of_priorities.into_iter().zip(expected)) {
        // Without a word it is 35.
        let count = if priorities.is_empty() { 2 } else { priorities.len() };
        let keys = &keys(sequence, count as u8);
        let blocks = filled(&mut client, &pool, keys).await;
        let retention = priorities.iter().map(|priority| run(1, *priority)).collect();
        let message = v1::Commit { retention, ..commit(namespace, pool.id, &blocks, keys) };
        client.stream.send(Ask::Commit(message)).await;
        let offload = v1::Offload { pool_id: pool.id, blocks: blocks.clone() };
        let done = client.transfer(Ask::Offload(offload)).await;
        assert_eq!(
            (done.blocks_done, done.blocks_failed),
            (in_host, keys.len() as u32 - in_host),
            "{done:?}"
        );
        assert_eq!(other.find(namespace, 0, keys).await.host_blocks, in_host);
    }
    assert_eq!(rig.metric("kvbm_tier_resident_blocks{tier=\"host\"}"), 3.0);
    assert_eq!(rig.metric("kvbm_offload_blocks_d2h"), 3.0);
    assert!(rig.metric("kvbm_offloads_unimportant_total") >= 6.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_that_does_not_fit_is_refused_and_loses_nothing() {
    let rig = Rig::start(&[]).await;
    let mut client = Client::attach(rig.socket()).await;
    let (namespace, pool) = (client.namespace().await, client.pool(8).await);
    let keys = keys(0, 3);
    let blocks = filled(&mut client, &pool, &keys).await;
    let message = |retention| v1::Commit { retention, ..commit(namespace, pool.id, &blocks, &keys) };
    let question = |retention| v1::Match {
        namespace_id: namespace,
        keys: pack_keys(&keys),
        pool_id: pool.id,
        retention,
        ..Default::default()
    };
    for wrong in [vec![run(2, 50)], vec![run(4, 50)], vec![run(3, 101)], vec![run(3, 50), run(0, 50)]] {
        for ask in [Ask::Commit(message(wrong.clone())), Ask::Match(question(wrong.clone()))] {
            let (refusal, detail) = client.refused(ask).await;
            assert_eq!(refusal, Refusal::Invalid, "{wrong:?}");
            assert!(detail.contains("retention"), "{detail}");
        }
    }
    assert_eq!(client.find(namespace, pool.id, &keys).await.device, []);
    client.stream.send(Ask::Commit(message(vec![run(1, 0), run(2, 100)]))).await;
    assert_eq!(client.find(namespace, pool.id, &keys).await.device, blocks);
}
