//! Engines that die, and engines that only fall silent.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use kvbm_proto::SideMessage;
use kvbm_proto::v1::{self, Refusal, client_message::Body as Ask, server_message::Body};
use kvbm_server::status::Status;

use crate::client::{Client, content, keys, open_pool};
use crate::rig::Rig;

const SOCKET: &str = "KVBM_TEST_SOCKET";

/// Not a test: what the child process of the tests below does.
#[tokio::test(flavor = "multi_thread")]
async fn as_a_child() {
    let Ok(socket) = std::env::var(SOCKET) else { return };
    let mut client = Client::attach(Path::new(&socket)).await;
    let (namespace, pool) = (client.namespace().await, client.pool(8).await);
    client.store(namespace, &pool, &keys(0, 3)).await;
    client.grants(pool.id, 2).await;
    let found = client.find(namespace, 0, &keys(0, 3)).await;
    assert!(found.lease_id > 0);
    let worker = v1::RegisterWorker {
        worker_id: "child".into(),
        endpoint: "unix:/child".into(),
        role: "both".into(),
        state: "ready".into(),
        pool_id: pool.id,
        ..Default::default()
    };
    client.ask(Ask::RegisterWorker(worker)).await;
    println!("\nREADY");
    let mut orders = std::io::stdin().lines();
    assert_eq!(orders.next().unwrap().unwrap(), "fall silent");
    drop(client);
    let _ = orders.next();
    unreachable!("it is killed");
}

fn spawn_child(socket: &Path) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "death::as_a_child", "--nocapture"])
        .env(SOCKET, socket)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line == "READY"), "the child failed");
    child
}

#[tokio::test(flavor = "multi_thread")]
async fn death_releases_what_was_held_and_the_successor_inherits_the_pool() {
    let rig = Rig::start(&[]).await;
    let mut child = spawn_child(rig.socket());
    let status = rig.daemon.status();
    assert_eq!((status.leases, status.workers.len(), status.sessions[0].pid), (1, 1, Some(child.id())));
    let slots = status.pools[0].slots;
    assert_eq!((slots.filling, slots.resident, slots.pinned), (2, 3, 3));
    child.kill().unwrap();
    child.wait().unwrap();
    let status = rig.until("the session is gone", |status| status.sessions.is_empty()).await;
    assert_eq!((status.leases, status.workers.len()), (0, 0));
    assert_eq!((status.pools[0].state.as_str(), status.pools[0].session), ("orphan", None));
    let slots = status.pools[0].slots;
    assert_eq!((slots.filling, slots.resident, slots.pinned, slots.quarantined), (0, 3, 0, 0));

    let mut successor = Client::attach(rig.socket()).await;
    let pool = successor.pool(8).await;
    assert_eq!((pool.id, pool.reply.entries.len(), pool.reply.namespaces.len()), (status.pools[0].id, 3, 1));
    let namespace = successor.namespace().await;
    assert_eq!(pool.reply.namespaces[0].namespace_id, namespace);
    let found = successor.find(namespace, pool.id, &keys(0, 3)).await;
    assert_eq!(found.device.len(), 3);
    for (block, key) in found.device.iter().zip(keys(0, 3)) {
        let mut seen = content(&key);
        seen.fill(0);
        pool.memory.memory().read(pool.memory.layout().offset(block.block), &mut seen);
        assert_eq!(seen, content(&key));
    }
}

/// The first session is silent, and so many blocks are set aside for it.
fn is_quarantined(status: &Status, blocks: u64) -> bool {
    status.sessions[0].state == "silent" && status.tiers[0].slots.quarantined == blocks
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_holder_is_quarantined_until_it_dies() {
    let rig = Rig::start(&[]).await;
    let mut child = spawn_child(rig.socket());
    writeln!(child.stdin.as_mut().unwrap(), "fall silent").unwrap();
    // Two granted blocks. The three committed ones are pinned by their grants.
    let status = rig.until("silent and quarantined", |status| is_quarantined(status, 5)).await;
    assert_eq!((status.sessions[0].pid, status.workers.len()), (Some(child.id()), 0));
    let mut other = Client::attach(rig.socket()).await;
    assert_eq!(other.pool(8).await.reply.entries.len(), 0, "nobody inherits it yet");
    child.kill().unwrap();
    child.wait().unwrap();
    let status = rig.until("dead", |status| status.sessions.len() == 1).await;
    assert_eq!((status.tiers[0].slots.quarantined, status.leases), (0, 0));
    assert_eq!(other.pool(8).await.reply.entries.len(), 3, "now it is there for a successor");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_is_stopped_is_neither_silent_nor_dead() {
    let rig = Rig::start(&[("bind_timeout_ms", "10"), ("session_stall_ms", "10")]).await;
    let mut child = spawn_child(rig.socket());
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-STOP", &pid]).status().unwrap().success());
    // Others are served meanwhile, and time passes for leases.
    let mut other = Client::attach(rig.socket()).await;
    for _ in 0..1000 {
        other.sync().await;
    }
    let status = rig.daemon.status();
    assert_eq!((status.sessions[0].state.as_str(), status.tiers[0].slots.quarantined), ("attached", 0));
    assert_eq!(status.workers.len(), 1);
    child.kill().unwrap();
    child.wait().unwrap();
    rig.until("the session is gone", |status| status.sessions.len() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_holder_is_quarantined_until_it_hands_its_pool_back() {
    let rig = Rig::start(&[]).await;
    let mut client = Client::attach(rig.socket()).await;
    let (namespace, pool) = (client.namespace().await, client.pool(8).await);
    let blocks = client.store(namespace, &pool, &keys(0, 3)).await;
    client.grants(pool.id, 2).await;
    // The stream goes, and with it the side channel; this process lives.
    drop(client);
    let status = rig.until("silent and quarantined", |status| is_quarantined(status, 5)).await;
    assert_eq!(status.pools[0].state, "silent");
    assert_eq!(rig.metric("kvbm_quarantined_blocks"), 5.0);
    let mut other = Client::attach(rig.socket()).await;
    let second = other.pool(8).await;
    assert_ne!(second.id, pool.id, "nobody inherits what a silent holder may still write to");

    let epoch = pool.memory.raise_epoch();
    let mut client = Client::attach(rig.socket()).await;
    assert_eq!(client.namespace().await, namespace);
    let uuid = pool.memory.uuid();
    client.side.send(&SideMessage::PoolMemory { uuid }.encode(), Some(pool.memory.fd())).unwrap();
    let entry = |(i, block): (usize, &v1::BlockRef)| v1::PoolEntry {
        block: Some(*block),
        namespace_id: namespace,
        key: keys(0, 3)[i].to_vec(),
        parent: i.checked_sub(1).map_or_else(Vec::new, |i| keys(0, 3)[i].to_vec()),
        held: i == 0,
        ..Default::default()
    };
    let adoption = v1::Adoption {
        pool_uuid: uuid.to_vec(),
        epoch,
        entries: blocks.iter().enumerate().map(entry).collect(),
        held: vec![v1::BlockRef { block: 7, generation: 9 }],
    };
    let open = v1::OpenPool { adoption: Some(adoption), ..open_pool(8) };
    let Body::Pool(reply) = client.ask(Ask::OpenPool(open)).await else { panic!() };
    assert_eq!((reply.epoch, reply.pool_uuid.as_slice()), (epoch, uuid.as_slice()));
    let status = rig.until("the former session is gone", |status| status.sessions.len() == 2).await;
    assert!(status.sessions.iter().all(|session| session.state == "attached"));
    assert_eq!(status.tiers[0].slots.quarantined, 0);
    let slots = status.pools.iter().find(|found| found.id == reply.pool_id).unwrap().slots;
    assert_eq!((slots.free, slots.filling, slots.resident, slots.pinned), (4, 1, 3, 1));
    assert_eq!(client.find(namespace, reply.pool_id, &keys(0, 3)).await.device.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adoption_without_its_memory_is_refused_in_time() {
    let rig = Rig::start(&[("bind_timeout_ms", "200")]).await;
    let mut client = Client::attach(rig.socket()).await;
    let adoption = v1::Adoption { pool_uuid: vec![5; 16], epoch: 2, ..Default::default() };
    let open = v1::OpenPool { adoption: Some(adoption), ..open_pool(8) };
    let (refusal, detail) = client.refused(Ask::OpenPool(open)).await;
    assert_eq!((refusal, detail.contains("did not come in time")), (Refusal::Invalid, true), "{detail}");
    client.sync().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_no_answers_is_disconnected() {
    let rig = Rig::start(&[("session_queue_depth", "4"), ("session_stall_ms", "50")]).await;
    let mut client = Client::attach(rig.socket()).await;
    let (namespace, _pool) = (client.namespace().await, client.pool(2).await);
    // Questions with long answers, until neither the daemon nor the connection takes more.
    let Client { mut stream, side, .. } = client;
    let asking = tokio::spawn(async move {
        let find =
            || v1::Match { namespace_id: namespace, keys: vec![9; 3], pool_id: 0, ..Default::default() };
        for _ in 0..100_000 {
            if stream.try_send(Ask::Match(find())).await.is_err() {
                break;
            }
        }
        stream
    });
    rig.until("silent", |status| status.sessions[0].state == "silent").await;
    assert_eq!(rig.metric("kvbm_busy_total{queue=\"session_answers\"}"), 1.0);
    asking.abort();
    drop(side);
}
