//! Numbered events and snapshots.

use std::collections::BTreeSet;

use kvbm_proto::v1::{self, EventKind, Tier};
use tonic::Code;

use crate::client::{Client, DIGEST, keys};
use crate::rig::Rig;

type Place = (i32, u32, Vec<u8>);

fn place(event: &v1::Event) -> Place {
    (event.tier, event.pool_id, event.key.clone())
}

/// Applies one event to an index, as a router would.
fn apply(index: &mut BTreeSet<Place>, event: &v1::Event) {
    match event.kind() {
        EventKind::Stored => assert!(index.insert(place(event)), "{event:?}"),
        EventKind::Removed => assert!(index.remove(&place(event)), "{event:?}"),
        EventKind::Cleared => index.retain(|(tier, pool, _)| (*tier, *pool) != (event.tier, event.pool_id)),
        EventKind::Unspecified => panic!("{event:?}"),
    }
}

async fn snapshot(rig: &Rig) -> (u64, BTreeSet<Place>) {
    let mut parts = rig.registry().await.snapshot(v1::SnapshotRequest {}).await.unwrap().into_inner();
    let mut index = BTreeSet::new();
    loop {
        let part = parts.message().await.unwrap().expect("the last part says so");
        part.stored.iter().for_each(|event| apply(&mut index, event));
        if part.last {
            assert!(parts.message().await.unwrap().is_none());
            return (part.sequence, index);
        }
    }
}

async fn events_until(stream: &mut tonic::Streaming<v1::EventBatch>, last: u64) -> Vec<v1::Event> {
    let mut events = Vec::new();
    while events.last().is_none_or(|event: &v1::Event| event.sequence < last) {
        events.extend(stream.message().await.unwrap().unwrap().events);
    }
    events
}

#[tokio::test(flavor = "multi_thread")]
async fn events_have_no_gaps_and_lead_to_the_snapshot() {
    let rig = Rig::start(&[]).await;
    let watch = v1::WatchEventsRequest { after_sequence: 0 };
    let mut stream = rig.registry().await.watch_events(watch).await.unwrap().into_inner();
    let mut client = Client::attach(rig.socket()).await;
    let (namespace, pool) = (client.namespace().await, client.pool(4).await);
    let worker = v1::RegisterWorker {
        worker_id: "w".into(),
        endpoint: "unix:/w".into(),
        role: "both".into(),
        state: "ready".into(),
        pool_id: pool.id,
        ..Default::default()
    };
    client.ask(v1::client_message::Body::RegisterWorker(worker)).await;
    for sequence in 0..6 {
        let blocks = client.store(namespace, &pool, &keys(sequence, 3)).await;
        client.release(pool.id, &blocks).await;
    }
    client.sync().await;
    let (sequence, resident) = snapshot(&rig).await;
    assert!(sequence > 6 * 6, "stored in two tiers, and evicted from one");
    let events = events_until(&mut stream, sequence).await;
    let numbers: Vec<u64> = events.iter().map(|event| event.sequence).collect();
    assert_eq!(numbers, (1..=sequence).collect::<Vec<_>>());
    let mut index = BTreeSet::new();
    events.iter().for_each(|event| apply(&mut index, event));
    assert_eq!(index, resident);
    assert_eq!(resident.iter().filter(|(tier, ..)| *tier == i32::from(Tier::Host)).count(), 18);
    for event in &events {
        let device = event.tier() == Tier::Device;
        assert_eq!((event.worker_id.as_str(), event.pool_id), if device { ("w", pool.id) } else { ("", 0) });
        assert_eq!((event.namespace_id, event.namespace_digest.as_slice()), (namespace, DIGEST.as_slice()));
    }
    // A watcher that comes later continues behind what it knows.
    let watch = v1::WatchEventsRequest { after_sequence: sequence - 2 };
    let mut later = rig.registry().await.watch_events(watch).await.unwrap().into_inner();
    assert_eq!(events_until(&mut later, sequence).await, events[events.len() - 2..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_are_not_kept_are_out_of_range() {
    let rig = Rig::start(&[("events_kept", "4")]).await;
    let mut client = Client::attach(rig.socket()).await;
    let (namespace, pool) = (client.namespace().await, client.pool(4).await);
    client.store(namespace, &pool, &keys(0, 4)).await;
    for after_sequence in [0, 1_000_000] {
        let watch = v1::WatchEventsRequest { after_sequence };
        let mut stream = rig.registry().await.watch_events(watch).await.unwrap().into_inner();
        assert_eq!(stream.message().await.unwrap_err().code(), Code::OutOfRange);
    }
}
