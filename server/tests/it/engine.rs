//! Engines that own their KV memory, over the wire: a client with pools of its own, and one in a process that dies.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use kvbm_proto::v1::{self, Refusal, StoreVerdict, client_message::Body as Ask, server_message::Body};
use kvbm_proto::{SideMessage, pack_keys};
use kvbm_shm::{PinState, PoolWords, SharedMemory};

use crate::client::{BASE, BLOCK_BYTES, Client, TOKENS_PER_BLOCK, content, keys, wait_readable};
use crate::rig::Rig;

const SOCKET: &str = "KVBM_TEST_ENGINE_SOCKET";
const MODE: &str = "KVBM_TEST_ENGINE_MODE";
const BLOCKS: u32 = 200;

/// A pool of an engine, with what came on the side channel about it.
pub struct EnginePool {
    id: u32,
    words: PoolWords,
    memory: SharedMemory,
    segments: HashMap<u32, SharedMemory>,
    reply: v1::PoolReply,
}

fn open_pool(mode: v1::PoolMode, engine: u8) -> v1::OpenPool {
    v1::OpenPool {
        mode: mode.into(),
        base: BASE.to_vec(),
        block_bytes: BLOCK_BYTES as u64,
        block_count: BLOCKS,
        tokens_per_block: TOKENS_PER_BLOCK,
        device: "cpu:0".into(),
        shard_count: 1,
        engine: vec![engine; 16],
        rank_count: 1,
        ..Default::default()
    }
}

fn pool_bytes() -> usize {
    (BLOCK_BYTES * BLOCKS as usize).next_multiple_of(4096)
}

impl EnginePool {
    pub async fn open(client: &mut Client, mode: v1::PoolMode, engine: u8) -> Self {
        let memory = SharedMemory::create("engine", pool_bytes()).unwrap();
        let mut open = open_pool(mode, engine);
        if mode == v1::PoolMode::Ipc {
            let name = [engine; 16];
            client.side.send(&SideMessage::PoolMemory { uuid: name }.encode(), Some(memory.fd())).unwrap();
            let kind = Some(v1::pool_export::Kind::Memory(name.to_vec()));
            open.exports = vec![v1::PoolExport { kind, bytes: pool_bytes() as u64, ..Default::default() }];
            // Two pieces: they need not lie behind each other.
            let half = BLOCK_BYTES as u64 / 2;
            let stride = BLOCK_BYTES as u64;
            let piece = |offset| v1::Fragment { export: 0, offset, stride, bytes: half };
            open.fragments = vec![piece(0), piece(half)];
        }
        match client.ask(Ask::OpenPool(open)).await {
            Body::Pool(reply) => {
                let packet = client.side.receive().unwrap().expect("the words come before the reply");
                let uuid = reply.pool_uuid.clone().try_into().unwrap();
                assert_eq!(SideMessage::decode(&packet.bytes), Ok(SideMessage::PoolWords { uuid }));
                let words = PoolWords::from_fd(packet.fd.unwrap()).unwrap();
                let mut pool = Self { id: reply.pool_id, words, memory, segments: HashMap::new(), reply };
                pool.map(client).await;
                pool
            }
            other => panic!("{other:?}"),
        }
    }

    /// Maps the host segments that have come, at least one, and says so.
    async fn map(&mut self, client: &mut Client) {
        if self.segments.is_empty() {
            wait_readable(&client.side);
        }
        while let Ok(Some(packet)) = client.side.receive() {
            let Ok(SideMessage::HostSegment { segment }) = SideMessage::decode(&packet.bytes) else {
                panic!("{:?}", packet.bytes)
            };
            self.segments.insert(segment, SharedMemory::from_fd(packet.fd.unwrap()).unwrap());
        }
        let mapped =
            v1::MappedSegments { pool_id: self.id, segments: self.segments.keys().copied().collect() };
        client.stream.send(Ask::MappedSegments(mapped)).await;
    }

    fn write(&self, block: u32, bytes: &[u8]) {
        self.words.raise_generation(block);
        self.memory.write(block as usize * BLOCK_BYTES, bytes);
    }

    fn block(&self, block: u32) -> v1::BlockRef {
        v1::BlockRef { block, generation: self.words.generation(block) }
    }

    /// Writes blocks and says that they are complete: a chain, or (`apart`) each a sequence of its own.
    fn store(&self, namespace_id: u32, keys: &[[u8; 16]], apart: bool) -> v1::Store {
        for (block, key) in keys.iter().enumerate() {
            self.write(block as u32, &content(key));
        }
        let before = |at: usize| at.checked_sub(1).filter(|_| !apart).map_or([0; 16], |before| keys[before]);
        let parents: Vec<[u8; 16]> = (0..keys.len()).map(before).collect();
        v1::Store {
            namespace_id,
            pool_id: self.id,
            blocks: (0..keys.len() as u32).map(|block| self.block(block)).collect(),
            keys: pack_keys(keys),
            parents: pack_keys(&parents),
            ..Default::default()
        }
    }

    /// Of a staged pool: writes blocks and has them stored.
    pub async fn store_all(&self, client: &mut Client, namespace: u32, keys: &[[u8; 16]]) {
        let reply = client.store_reply(self.store(namespace, keys, false)).await;
        assert_eq!(reply.verdicts, verdicts(StoreVerdict::Write, keys.len()));
        let slots = reply.slots.unwrap();
        for (at, key) in keys.iter().enumerate() {
            let (segment, offset) = self.slot(&slots, at);
            segment.write(offset, &content(key));
            self.words.clear_pin(slots.pins[at]);
        }
        let done = v1::StoreDone { store_id: reply.store_id, copied: vec![1; keys.len()] };
        client.stream.send(Ask::StoreDone(done)).await;
        client.sync().await;
    }

    fn slot(&self, slots: &v1::Slots, at: usize) -> (&SharedMemory, usize) {
        let offset = slots.indices[at] as usize * self.reply.slot_stride as usize;
        (&self.segments[&slots.segments[at]], offset + self.reply.shard_offset as usize)
    }

    fn in_slot(&self, slots: &v1::Slots, at: usize) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK_BYTES];
        let (segment, offset) = self.slot(slots, at);
        segment.read(offset, &mut bytes);
        bytes
    }
}

impl Client {
    async fn store_reply(&mut self, store: v1::Store) -> v1::StoreReply {
        match self.ask(Ask::Store(store)).await {
            Body::Store(reply) => reply,
            other => panic!("{other:?}"),
        }
    }

    async fn hold(&mut self, namespace_id: u32, keys: &[[u8; 16]], skip_blocks: u32) -> v1::MatchReply {
        let keys = pack_keys(keys);
        let find = v1::Match { namespace_id, keys, skip_blocks, hold: true, ..Default::default() };
        match self.ask(Ask::Match(find)).await {
            Body::Match(reply) => reply,
            other => panic!("{other:?}"),
        }
    }
}

pub fn verdicts(verdict: StoreVerdict, count: usize) -> Vec<u8> {
    vec![verdict as u8; count]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_staged_engine_copies_both_ways_by_itself() {
    let rig = Rig::start(&[]).await;
    let mut client = Client::attach(rig.socket()).await;
    let namespace = client.namespace().await;
    let mut pool = EnginePool::open(&mut client, v1::PoolMode::Staged, 1).await;
    assert_eq!(pool.reply.slot_stride, (BLOCK_BYTES as u64).next_multiple_of(4096));
    let keys = keys(0, 6);
    let store = pool.store(namespace, &keys, false);
    let reply = client.store_reply(store.clone()).await;
    assert_eq!(reply.verdicts, verdicts(StoreVerdict::Write, 6));
    let slots = reply.slots.unwrap();
    let status = rig.daemon.status();
    let row = &status.engine_pools[0];
    assert_eq!((row.mode.as_str(), row.state.as_str(), row.writing), ("staged", "attached", 6));
    assert_eq!(rig.metric("kvbm_staged_slots"), 6.0);
    pool.map(&mut client).await;
    for (at, key) in keys.iter().enumerate() {
        assert_eq!(pool.words.pin(slots.pins[at]), PinState::InUse(reply.store_id));
        let (segment, offset) = pool.slot(&slots, at);
        segment.write(offset, &content(key));
        pool.words.clear_pin(slots.pins[at]);
    }
    let done = v1::StoreDone { store_id: reply.store_id, copied: vec![1; 6] };
    client.stream.send(Ask::StoreDone(done.clone())).await;
    assert_eq!(client.store_reply(store).await.verdicts, verdicts(StoreVerdict::Resident, 6));
    assert_eq!(client.refused(Ask::StoreDone(done)).await.0, Refusal::Unknown);

    let found = client.hold(namespace, &keys, 2).await;
    assert_eq!((found.device.len(), found.host_blocks, found.lease_ms), (0, 4, 0));
    let slots = found.slots.unwrap();
    assert!(pool.words.begin_use(found.pin, found.lease_id));
    for (at, key) in keys[2..].iter().enumerate() {
        assert!(pool.in_slot(&slots, at) == content(key));
    }
    assert_eq!(rig.daemon.status().leases, 1);
    pool.words.clear_pin(found.pin);
    let release = v1::ReleaseLease { lease_id: found.lease_id, whole: false };
    client.stream.send(Ask::ReleaseLease(release)).await;
    client.sync().await;
    assert_eq!(rig.daemon.status().leases, 0);
    assert_eq!(rig.metric("kvbm_store_blocks_total{verdict=\"stored\"}"), 6.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ipc_engine_is_stored_from_and_loaded_into_by_the_daemon() {
    let rig = Rig::start(&[]).await;
    let mut client = Client::attach(rig.socket()).await;
    let namespace = client.namespace().await;
    let pool = EnginePool::open(&mut client, v1::PoolMode::Ipc, 1).await;
    let keys = keys(0, 6);
    let fence = Some(v1::Fence { word: 5, value: 1 });
    let store = v1::Store { fence, ..pool.store(namespace, &keys, false) };
    let id = client.stream.send(Ask::Store(store)).await;
    // Others are answered while the fence is waited for.
    assert_eq!(client.find(namespace, pool.id, &keys).await.host_blocks, 0);
    pool.words.signal(5, 1);
    let stored = client.stream.next().await.unwrap().unwrap();
    assert_eq!(stored.id, id);
    let Some(Body::Store(reply)) = stored.body else { panic!("{stored:?}") };
    assert_eq!(reply.verdicts, verdicts(StoreVerdict::Stored, 6));

    let found = client.find(namespace, pool.id, &keys).await;
    assert_eq!((found.device.len(), found.host_blocks), (0, 6));
    assert!(found.lease_ms > 0 && found.slots.is_none());
    let targets: Vec<_> = (50..54).map(|block| pool.block(block)).collect();
    let onboard =
        v1::Onboard { lease_id: found.lease_id, pool_id: pool.id, targets: targets.clone(), first: 2 };
    let done = client.transfer(Ask::Onboard(onboard.clone())).await;
    assert_eq!((done.blocks_done, done.blocks_failed), (4, 0));
    for (target, key) in targets.iter().zip(&keys[2..]) {
        let mut bytes = vec![0; BLOCK_BYTES];
        pool.memory.read(target.block as usize * BLOCK_BYTES, &mut bytes);
        assert!(bytes == content(key));
    }
    pool.words.raise_generation(51);
    let done = client.transfer(Ask::Onboard(onboard)).await;
    assert_eq!((done.blocks_failed, done.refusal()), (4, Refusal::Stale));
    let gone = client.ask(Ask::CancelOnboard(v1::CancelOnboard { onboard_id: 12345 })).await;
    assert_eq!(gone, Body::Cancel(v1::CancelReply { found: false }));
    let row = &rig.daemon.status().engine_pools[0];
    assert_eq!((row.mode.as_str(), row.registered, row.blocks), ("ipc", 0, u64::from(BLOCKS)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_served_is_refused_by_field() {
    let rig = Rig::start(&[]).await;
    let mut client = Client::attach(rig.socket()).await;
    let namespace = client.namespace().await;
    let kind = Some(v1::pool_export::Kind::CudaIpc(v1::CudaIpc { handle: vec![1; 64], offset: 0 }));
    let cuda = v1::PoolExport { kind, bytes: 4096, gpu_uuid: "GPU-1".into() };
    let open = v1::OpenPool { exports: vec![cuda], ..open_pool(v1::PoolMode::Ipc, 1) };
    let refused = client.refused(Ask::OpenPool(open)).await;
    let expected = "exports: this daemon has no CUDA: open the pool as staged".to_owned();
    assert_eq!(refused, (Refusal::Invalid, expected));
    for (open, field) in [
        (v1::OpenPool { engine: vec![1], ..open_pool(v1::PoolMode::Staged, 1) }, "engine"),
        (v1::OpenPool { rank: 1, ..open_pool(v1::PoolMode::Staged, 1) }, "rank"),
        (v1::OpenPool { shard_count: 2, ..open_pool(v1::PoolMode::Staged, 1) }, "shard_count"),
        (v1::OpenPool { rank_count: 65, ..open_pool(v1::PoolMode::Staged, 1) }, "rank_count"),
        (v1::OpenPool { block_bytes: u64::MAX, ..open_pool(v1::PoolMode::Staged, 1) }, "block_bytes"),
        (v1::OpenPool { block_count: 0, ..open_pool(v1::PoolMode::Staged, 1) }, "block_bytes"),
        (open_pool(v1::PoolMode::Ipc, 1), "fragments"),
    ] {
        let (refusal, detail) = client.refused(Ask::OpenPool(open)).await;
        assert!(refusal == Refusal::Invalid && detail.starts_with(field), "{field}: {detail}");
    }
    let hold = v1::Match { namespace_id: namespace, hold: true, ..Default::default() };
    assert_eq!(client.refused(Ask::Match(hold)).await.0, Refusal::Invalid);
    let pool = EnginePool::open(&mut client, v1::PoolMode::Staged, 1).await;
    let keys = keys(0, 2);
    let fence = Some(v1::Fence::default());
    let fenced = v1::Store { fence, ..pool.store(namespace, &keys, false) };
    assert_eq!(client.refused(Ask::Store(fenced)).await.0, Refusal::Invalid);
    let mapped = v1::MappedSegments { pool_id: pool.id, segments: vec![999] };
    assert_eq!(client.refused(Ask::MappedSegments(mapped)).await.0, Refusal::Unknown);
    let mut other = Client::attach(rig.socket()).await;
    other.namespace().await;
    let theirs = other.refused(Ask::Store(pool.store(namespace, &keys, false))).await;
    assert_eq!(theirs.0, Refusal::Unknown);
    // The same rank again: the engine has come back in another session.
    let anew = EnginePool::open(&mut other, v1::PoolMode::Staged, 1).await;
    let former = client.refused(Ask::Store(pool.store(namespace, &keys, false))).await;
    assert_eq!(former.0, Refusal::Unknown);
    let reply = other.store_reply(anew.store(namespace, &keys, false)).await;
    assert_eq!(reply.verdicts, verdicts(StoreVerdict::Write, 2));
}

/// Not a test: what the child process of the tests below does.
#[tokio::test(flavor = "multi_thread")]
async fn as_an_engine() {
    let Ok(socket) = std::env::var(SOCKET) else { return };
    let mut client = Client::attach(Path::new(&socket)).await;
    let namespace = client.namespace().await;
    let is_ipc = std::env::var(MODE).unwrap() == "ipc";
    let mode = if is_ipc { v1::PoolMode::Ipc } else { v1::PoolMode::Staged };
    let pool = EnginePool::open(&mut client, mode, 9).await;
    let keys = keys(0, BLOCKS as u8);
    let store = pool.store(namespace, if is_ipc { &keys } else { &keys[..8] }, true);
    let reply = client.store_reply(v1::Store { rescue_only: is_ipc, ..store }).await;
    if !is_ipc {
        assert_eq!(reply.verdicts, verdicts(StoreVerdict::Write, 8));
    }
    let fd = |fd: std::os::fd::BorrowedFd<'_>| std::os::fd::AsRawFd::as_raw_fd(&fd);
    println!("\nREADY {} {}", fd(pool.memory.fd()), fd(pool.words.fd()));
    // Blocks are assigned anew until the end.
    if !is_ipc {
        std::future::pending::<()>().await;
    }
    let mut block = 0;
    loop {
        block = (block + 37) % BLOCKS;
        if block % 2 == 0 {
            pool.write(block, &[0xEE; BLOCK_BYTES]);
        }
        std::thread::yield_now();
    }
}

fn spawn_engine(socket: &Path, mode: &str) -> (Child, Vec<PathBuf>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "engine::as_an_engine", "--nocapture"])
        .env(SOCKET, socket)
        .env(MODE, mode)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let ready = lines.find(|line| line.starts_with("READY ")).expect("the child failed");
    let fds = ready.split(' ').skip(1).map(|fd| format!("/proc/{}/fd/{fd}", child.id()).into());
    let fds = fds.collect();
    (child, fds)
}

fn open_again(path: &Path) -> std::os::fd::OwnedFd {
    std::fs::File::options().read(true).write(true).open(path).unwrap().into()
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_of_an_engine_that_is_killed_while_it_reassigns_them_are_rescued_if_they_are_still_valid() {
    let rig = Rig::start(&[]).await;
    let (mut child, fds) = spawn_engine(rig.socket(), "ipc");
    let words = PoolWords::from_fd(open_again(&fds[1])).unwrap();
    let status = rig.daemon.status();
    assert_eq!(status.engine_pools[0].registered, u64::from(BLOCKS));
    assert_eq!(status.tiers[1].slots.resident, 0, "nothing was offloaded");
    // It is at it.
    while (0..BLOCKS).filter(|block| words.generation(*block) > 1).count() < 20 {
        tokio::task::yield_now().await;
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let still = (0..BLOCKS).filter(|block| words.generation(*block) == 1).count();
    assert!(still >= BLOCKS as usize / 2 && still < BLOCKS as usize, "{still}");
    let status = rig.until("rescued", |status| status.engine_pools.is_empty()).await;
    assert_eq!(status.tiers[1].slots.resident, still as u64);
    assert_eq!(rig.metric("kvbm_rescued_blocks_total"), still as f64);

    let mut client = Client::attach(rig.socket()).await;
    let namespace = client.namespace().await;
    let pool = EnginePool::open(&mut client, v1::PoolMode::Staged, 2).await;
    for (block, key) in keys(0, BLOCKS as u8).iter().enumerate() {
        let found = client.hold(namespace, &[*key], 0).await;
        let is_valid = words.generation(block as u32) == 1;
        assert_eq!(found.host_blocks, u32::from(is_valid), "block {block}");
        if is_valid {
            assert!(pool.in_slot(&found.slots.unwrap(), 0) == content(key), "block {block} has other bytes");
            let release = v1::ReleaseLease { lease_id: found.lease_id, whole: true };
            client.stream.send(Ask::ReleaseLease(release)).await;
        }
    }
    client.sync().await;
    assert_eq!(rig.daemon.status().leases, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_that_a_stopped_engine_writes_are_kept_from_others_until_it_is_dead() {
    let rig = Rig::start(&[("shard_wait_ms", "10")]).await;
    let (mut child, _) = spawn_engine(rig.socket(), "staged");
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-STOP", &pid]).status().unwrap().success());
    let mut other = Client::attach(rig.socket()).await;
    for _ in 0..1000 {
        other.sync().await;
    }
    let status = rig.daemon.status();
    assert_eq!((status.engine_pools[0].writing, status.tiers[1].slots.filling), (8, 8));
    child.kill().unwrap();
    child.wait().unwrap();
    let status = rig.until("freed", |status| status.engine_pools.is_empty()).await;
    assert_eq!((status.tiers[1].slots.filling, status.tiers[1].slots.resident), (0, 0));
}
