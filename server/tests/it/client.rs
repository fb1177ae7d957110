//! An engine's side of the wire, bare.

use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use kvbm_proto::v1::cache_client::CacheClient;
use kvbm_proto::v1::{
    self, ClientMessage, Refusal, ServerMessage, client_message::Body as Ask, server_message::Body,
};
use kvbm_proto::{SideMessage, pack_keys};
use kvbm_shm::{PoolMemory, SideSocket};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Status, Streaming};

pub const BASE: [u8; 32] = [0xBA; 32];
pub const DIGEST: [u8; 32] = [0xD1; 32];
pub const BLOCK_BYTES: usize = 5000;
pub const TOKENS_PER_BLOCK: u32 = 32;

pub async fn channel(socket: &Path) -> Channel {
    let socket = socket.to_owned();
    let connect = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://kvbm").connect_with_connector(connect).await.unwrap()
}

/// A stream without a side channel.
pub struct Stream {
    requests: mpsc::Sender<ClientMessage>,
    answers: Streaming<ServerMessage>,
    last_id: u64,
}

impl Stream {
    pub async fn open(socket: &Path) -> Self {
        let (requests, receiver) = mpsc::channel(256);
        let mut client = CacheClient::new(channel(socket).await);
        let answers = client.attach(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        Self { requests, answers, last_id: 0 }
    }

    /// Sends without waiting; returns the id.
    pub async fn send(&mut self, body: Ask) -> u64 {
        self.last_id += 1;
        let message = ClientMessage { id: self.last_id, body: Some(body), trace: None };
        self.requests.send(message).await.unwrap();
        self.last_id
    }

    pub async fn next(&mut self) -> Result<Option<ServerMessage>, Status> {
        self.answers.message().await
    }

    /// Sends and waits for the answer, which must be the next.
    pub async fn ask(&mut self, body: Ask) -> Body {
        let id = self.send(body).await;
        let message = self.next().await.unwrap().expect("the stream goes on");
        assert_eq!(message.id, id, "{message:?}");
        message.body.unwrap()
    }

    pub async fn hello(&mut self) -> v1::HelloReply {
        let hello = v1::Hello {
            protocol_version: 1,
            pid: std::process::id(),
            client: "test".into(),
            ..Default::default()
        };
        match self.ask(Ask::Hello(hello)).await {
            Body::Hello(reply) => reply,
            other => panic!("{other:?}"),
        }
    }
}

/// A session with its side channel.
pub struct Client {
    pub stream: Stream,
    pub side: SideSocket,
    pub session: u64,
    pub hello: v1::HelloReply,
}

pub struct Pool {
    pub id: u32,
    pub memory: PoolMemory,
    pub reply: v1::PoolReply,
}

pub fn side_path(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".fd");
    path.into()
}

/// Blocks this thread until there is something to read.
pub fn wait_readable(side: &SideSocket) {
    let mut fds = [rustix::event::PollFd::new(side, rustix::event::PollFlags::IN)];
    let limit = rustix::event::Timespec { tv_sec: 30, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut fds, Some(&limit)), Ok(1), "nothing came on the side channel");
}

impl Client {
    pub async fn attach(socket: &Path) -> Self {
        let mut stream = Stream::open(socket).await;
        let reply = stream.hello().await;
        let side = SideSocket::connect(&side_path(socket)).unwrap();
        let token = reply.token.clone().try_into().unwrap();
        side.send(&SideMessage::Bind { token }.encode(), None).unwrap();
        wait_readable(&side);
        assert_eq!(side.receive().unwrap().unwrap().bytes, b"A");
        Self { stream, side, session: reply.session_id, hello: reply }
    }

    pub fn token(&self) -> [u8; 32] {
        self.hello.token.clone().try_into().unwrap()
    }

    pub async fn ask(&mut self, body: Ask) -> Body {
        self.stream.ask(body).await
    }

    pub async fn refused(&mut self, body: Ask) -> (Refusal, String) {
        match self.ask(body).await {
            Body::Refused(refused) => (refused.refusal(), refused.detail),
            other => panic!("{other:?}"),
        }
    }

    pub async fn namespace(&mut self) -> u32 {
        let (digest, base) = (DIGEST.to_vec(), BASE.to_vec());
        let body = Ask::RegisterNamespace(v1::RegisterNamespace {
            digest,
            base,
            tenant: "t".into(),
            model: "m".into(),
        });
        match self.ask(body).await {
            Body::Namespace(reply) => reply.namespace_id,
            other => panic!("{other:?}"),
        }
    }

    pub async fn pool(&mut self, blocks: u32) -> Pool {
        match self.ask(Ask::OpenPool(open_pool(blocks))).await {
            Body::Pool(reply) => {
                let packet = self.side.receive().unwrap().expect("the memory comes before the reply");
                let uuid = reply.pool_uuid.clone().try_into().unwrap();
                assert_eq!(SideMessage::decode(&packet.bytes), Ok(SideMessage::PoolMemory { uuid }));
                Pool { id: reply.pool_id, memory: PoolMemory::from_fd(packet.fd.unwrap()).unwrap(), reply }
            }
            other => panic!("{other:?}"),
        }
    }

    pub async fn grants(&mut self, pool_id: u32, count: u32) -> Vec<v1::BlockRef> {
        match self.ask(Ask::RequestGrants(v1::RequestGrants { pool_id, count })).await {
            Body::Grants(grants) => grants.blocks,
            other => panic!("{other:?}"),
        }
    }

    pub async fn find(&mut self, namespace_id: u32, pool_id: u32, keys: &[[u8; 16]]) -> v1::MatchReply {
        match self
            .ask(Ask::Match(v1::Match { namespace_id, keys: pack_keys(keys), pool_id, ..Default::default() }))
            .await
        {
            Body::Match(reply) => reply,
            other => panic!("{other:?}"),
        }
    }

    pub async fn transfer(&mut self, body: Ask) -> v1::TransferDone {
        match self.ask(body).await {
            Body::TransferDone(done) => done,
            other => panic!("{other:?}"),
        }
    }

    /// Answers one `Ping`: everything sent before has been handled.
    pub async fn sync(&mut self) {
        assert_eq!(self.ask(Ask::Ping(v1::Ping {})).await, Body::Pong(v1::Pong {}));
    }

    /// Fills, commits and offloads the blocks of `keys`; all stay held.
    pub async fn store(&mut self, namespace_id: u32, pool: &Pool, keys: &[[u8; 16]]) -> Vec<v1::BlockRef> {
        self.store_behind(namespace_id, pool, keys, 0).await
    }

    /// As [`Client::store`], but for the first `there`, which are there.
    pub async fn store_behind(
        &mut self,
        namespace_id: u32,
        pool: &Pool,
        keys: &[[u8; 16]],
        there: usize,
    ) -> Vec<v1::BlockRef> {
        let parent = there.checked_sub(1).map(|last| keys[last]);
        let keys = &keys[there..];
        let blocks = self.grants(pool.id, keys.len() as u32).await;
        assert_eq!(blocks.len(), keys.len());
        for (block, key) in blocks.iter().zip(keys) {
            pool.memory.memory().write(pool.memory.layout().offset(block.block), &content(key));
        }
        let mut commit = commit(namespace_id, pool.id, &blocks, keys);
        if let Some(parent) = parent {
            commit.parents[..16].copy_from_slice(&parent);
        }
        self.stream.send(Ask::Commit(commit)).await;
        let offload = v1::Offload { pool_id: pool.id, blocks: blocks.clone() };
        let done = self.transfer(Ask::Offload(offload)).await;
        assert_eq!((done.blocks_done, done.blocks_failed), (keys.len() as u32, 0), "{done:?}");
        blocks
    }

    pub async fn release(&mut self, pool_id: u32, blocks: &[v1::BlockRef]) {
        let release = v1::Release { pool_id, blocks: blocks.to_vec(), pins: vec![1; blocks.len()] };
        self.stream.send(Ask::Release(release)).await;
    }
}

pub fn open_pool(block_count: u32) -> v1::OpenPool {
    v1::OpenPool {
        mode: v1::PoolMode::Owned.into(),
        base: BASE.to_vec(),
        block_bytes: BLOCK_BYTES as u64,
        block_count,
        tokens_per_block: TOKENS_PER_BLOCK,
        device: "cpu:0".into(),
        shard_count: 1,
        ..Default::default()
    }
}

/// Keys of a sequence.
pub fn keys(sequence: u8, count: u8) -> Vec<[u8; 16]> {
    (0..count).map(|n| std::array::from_fn(|i| [sequence + 1, n, 7][i.min(2)])).collect()
}

/// The only bytes a block of that key may have.
pub fn content(key: &[u8; 16]) -> Vec<u8> {
    (0..BLOCK_BYTES)
        .map(|i| key[0].wrapping_mul(31) ^ key[1].wrapping_add(i as u8) ^ (i >> 8) as u8)
        .collect()
}

pub fn commit(namespace_id: u32, pool_id: u32, blocks: &[v1::BlockRef], keys: &[[u8; 16]]) -> v1::Commit {
    let parents: Vec<[u8; 16]> =
        std::iter::once([0; 16]).chain(keys.iter().copied()).take(keys.len()).collect();
    v1::Commit {
        namespace_id,
        pool_id,
        blocks: blocks.to_vec(),
        keys: pack_keys(keys),
        parents: pack_keys(&parents),
        ..Default::default()
    }
}

impl Stream {
    /// As [`Stream::send`], where the stream may have ended.
    pub async fn try_send(&mut self, body: Ask) -> Result<(), ()> {
        self.last_id += 1;
        let message = ClientMessage { id: self.last_id, body: Some(body), trace: None };
        self.requests.send(message).await.map_err(|_| ())
    }
}
