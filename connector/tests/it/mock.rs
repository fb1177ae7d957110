//! A daemon that fits on a page: one pool, no eviction of what is pinned, everything in host memory that was ever
//! committed, and a disk. A script may hold back its answers.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvbm_proto::v1::cache_server::{Cache, CacheServer};
use kvbm_proto::v1::client_message::Body as Question;
use kvbm_proto::v1::server_message::Body as Answer;
use kvbm_proto::v1::{self, ClientMessage, Refusal, ServerMessage};
use kvbm_proto::{MESSAGE_BYTES_MAX, SideMessage};
use kvbm_shm::{DeviceMemory, PoolLayout, PoolMemory, SharedMemory, SideListener, SideSocket};
use parking_lot::Mutex;
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status, Streaming};

/// What the daemon does not do by itself.
#[derive(Debug, Default, Clone, Copy)]
pub struct Hold {
    pub matches: bool,
    pub grants: bool,
    pub onboards: bool,
    /// Promotions, those that nobody waits for included.
    pub promotions: bool,
    /// Refuse to wait for promotions.
    pub busy: bool,
    /// Answer nothing but `Hello`.
    pub everything: bool,
    pub refuse_pool: bool,
    /// Refuse questions about the pool, until it is opened again.
    pub forget_pool: bool,
    /// Read nothing.
    pub deaf: bool,
}

#[derive(Debug, Default, Clone)]
pub struct Block {
    pub generation: u32,
    pub pins: u32,
    pub key: Option<Vec<u8>>,
}

#[derive(Default)]
pub struct State {
    pub hold: Hold,
    /// Everything that came, but for greetings.
    pub log: Vec<(u64, ClientMessage)>,
    /// Questions that were not answered.
    pub held: Vec<(u64, ClientMessage)>,
    pub blocks: Vec<Block>,
    pub memory: Option<Arc<PoolMemory>>,
    pub adoptions: Vec<v1::Adoption>,
    /// Keys in host memory; each block there is filled with the first byte of its key.
    pub host: HashSet<Vec<u8>>,
    /// Keys on disk. They come to host memory when they are waited for.
    pub disk: HashSet<Vec<u8>>,
    /// Any other key is on disk as well.
    pub disk_has_all: bool,
    leases: HashMap<u64, Vec<Vec<u8>>>,
    next_lease: u64,
    sessions: HashMap<u64, mpsc::Sender<Result<ServerMessage, Status>>>,
    namespaces: u32,
    side: HashMap<u64, Arc<SideSocket>>,
    arrived: HashMap<Vec<u8>, PoolMemory>,
    devices: HashMap<Vec<u8>, OwnedFd>,
}

pub struct Mock {
    pub state: Arc<Mutex<State>>,
    pub socket: PathBuf,
    stop: Arc<AtomicBool>,
    runtime: Option<Runtime>,
    side: Option<std::thread::JoinHandle<()>>,
}

#[derive(Clone)]
struct Service(Arc<Mutex<State>>);

/// Polls until `condition` gives something. What never does is a failure, with the reason `what`.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Mock {
    pub fn start(socket: &Path) -> Self {
        let state = Arc::new(Mutex::new(State { next_lease: 100, ..State::default() }));
        let stop = Arc::new(AtomicBool::new(false));
        let side = SideListener::bind(&socket.with_extension("sock.fd")).unwrap();
        let side = std::thread::spawn({
            let (state, stop) = (state.clone(), stop.clone());
            move || serve_side(&side, &state, &stop)
        });
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = {
            let _entered = runtime.enter();
            UnixListener::bind(socket).unwrap()
        };
        let service = CacheServer::new(Service(state.clone())).max_decoding_message_size(MESSAGE_BYTES_MAX);
        runtime.spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(UnixListenerStream::new(listener)),
        );
        Self { state, socket: socket.to_owned(), stop, runtime: Some(runtime), side: Some(side) }
    }

    pub fn hold(&self, hold: Hold) {
        self.state.lock().hold = hold;
    }

    /// Answers what was held back, oldest first, as the state is now.
    pub fn let_go(&self) {
        let mut state = self.state.lock();
        state.hold = Hold::default();
        for (session, message) in std::mem::take(&mut state.held) {
            let id = message.id;
            let body = state.answer(session, message).expect("nothing is held back");
            state.send(session, id, body);
        }
    }

    /// Waits for a held question that `matches`.
    pub fn held(&self, what: &str, matches: impl Fn(&Question) -> bool) -> (u64, u64) {
        wait_for(what, || {
            let state = self.state.lock();
            let of = |(_, message): &&(u64, ClientMessage)| message.body.as_ref().is_some_and(&matches);
            state.held.iter().find(of).map(|(session, message)| (*session, message.id))
        })
    }

    /// Messages of the log that `select` picks.
    pub fn logged<T>(&self, select: impl Fn(&Question) -> Option<T>) -> Vec<T> {
        self.state.lock().log.iter().filter_map(|(_, message)| select(message.body.as_ref()?)).collect()
    }
}

impl Drop for Mock {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let state = std::mem::take(&mut *self.state.lock());
        drop(state);
        let _ = std::fs::remove_file(&self.socket);
        self.runtime.take().unwrap().shutdown_background();
        self.side.take().unwrap().join().unwrap();
    }
}

fn serve_side(listener: &SideListener, state: &Mutex<State>, stop: &AtomicBool) {
    let mut connections: Vec<Arc<SideSocket>> = Vec::new();
    while !stop.load(Ordering::SeqCst) {
        connections.extend(listener.accept().ok().map(Arc::new));
        connections.retain(|connection| {
            loop {
                match connection.receive() {
                    Ok(None) => return false,
                    Err(error) => return error.is_would_block(),
                    Ok(Some(packet)) => match SideMessage::decode(&packet.bytes).unwrap() {
                        SideMessage::Bind { token } => {
                            let session = u64::from_le_bytes(token[..8].try_into().unwrap());
                            state.lock().side.insert(session, connection.clone());
                            connection.send(&SideMessage::Bound.encode(), None).unwrap();
                        }
                        SideMessage::DeviceMemory { uuid } => {
                            state.lock().devices.insert(uuid.to_vec(), packet.fd.unwrap());
                        }
                        SideMessage::PoolMemory { uuid } => {
                            let mut state = state.lock();
                            let device = state.devices.remove(&uuid[..]);
                            let memory = PoolMemory::from_fds(packet.fd.unwrap(), device).unwrap();
                            state.arrived.insert(uuid.to_vec(), memory);
                        }
                        SideMessage::Bound
                        | SideMessage::Lookups { .. }
                        | SideMessage::PoolWords { .. }
                        | SideMessage::HostSegment { .. } => panic!("clients do not say that"),
                    },
                }
            }
        });
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Memory of the host stands in for that of a GPU.
pub fn on_gpu(layout: PoolLayout) -> PoolMemory {
    let bytes = (layout.stride() * layout.block_count as usize).next_multiple_of(2 << 20);
    let memory = SharedMemory::create("gpu", bytes).unwrap();
    let device = DeviceMemory { descriptor: memory.fd().try_clone_to_owned().unwrap(), bytes };
    PoolMemory::create_on_device([5; 16], layout, device).unwrap()
}

#[tonic::async_trait]
impl Cache for Service {
    type AttachStream = ReceiverStream<Result<ServerMessage, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<ClientMessage>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let (answers, stream) = mpsc::channel(1024);
        let state = self.0.clone();
        let session = {
            let mut state = state.lock();
            let session = state.sessions.len() as u64 + 1;
            state.sessions.insert(session, answers);
            session
        };
        let mut messages = request.into_inner();
        tokio::spawn(async move {
            while let Ok(Some(message)) = messages.message().await {
                if let Some(Question::OpenPool(v1::OpenPool { adoption: Some(adoption), .. })) = &message.body
                {
                    while !state.lock().arrived.contains_key(&adoption.pool_uuid) {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                }
                while state.lock().hold.deaf {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                let mut state = state.lock();
                let id = message.id;
                if let Some(body) = state.receive(session, message) {
                    state.send(session, id, body);
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

impl State {
    pub fn send(&mut self, session: u64, id: u64, body: Answer) {
        if let Some(answers) = self.sessions.get(&session) {
            let _ = answers.try_send(Ok(ServerMessage { id, body: Some(body) }));
        }
    }

    fn receive(&mut self, session: u64, message: ClientMessage) -> Option<Answer> {
        if let Some(Question::Hello(_)) = message.body {
            let mut token = vec![0; 32];
            token[..8].copy_from_slice(&session.to_le_bytes());
            let features = vec!["engine_pools".to_owned()];
            return Some(Answer::Hello(v1::HelloReply {
                token,
                session_id: session,
                features,
                ..Default::default()
            }));
        }
        self.log.push((session, message.clone()));
        self.answer(session, message)
    }

    fn answer(&mut self, session: u64, message: ClientMessage) -> Option<Answer> {
        let held = match message.body.as_ref().unwrap() {
            Question::Match(_) => self.hold.matches,
            Question::RequestGrants(_) => self.hold.grants,
            Question::Onboard(_) => self.hold.onboards,
            Question::Prefetch(_) => self.hold.promotions,
            _ => false,
        };
        if held || (self.hold.everything && message.id != 0) {
            self.held.push((session, message));
            return None;
        }
        match message.body.unwrap() {
            Question::RegisterNamespace(_) => {
                self.namespaces += 1;
                Some(Answer::Namespace(v1::NamespaceReply { namespace_id: self.namespaces }))
            }
            Question::OpenPool(open) => Some(self.open(session, open)),
            Question::JoinEngine(_) => Some(Answer::Engine(v1::EngineReply {})),
            Question::Match(_) | Question::RequestGrants(_) if self.hold.forget_pool => {
                Some(refused(Refusal::Unknown, "pool is not this session's"))
            }
            Question::Match(request) => Some(self.find(&request)),
            Question::RequestGrants(request) => Some(self.grant(request.count)),
            Question::Onboard(request) => Some(self.onboard(&request)),
            Question::Prefetch(_) if self.hold.busy => Some(refused(Refusal::Busy, "promotions")),
            Question::Prefetch(request) => Some(self.prefetch(&request)),
            Question::Commit(commit) => {
                for (block, key) in commit.blocks.iter().zip(commit.keys.chunks(16)) {
                    assert_eq!(self.blocks[block.block as usize].generation, block.generation);
                    self.blocks[block.block as usize].key = Some(key.to_vec());
                    self.host.insert(key.to_vec());
                }
                None
            }
            Question::Release(release) => {
                for (block, pins) in release.blocks.iter().zip(release.pins) {
                    let known = &mut self.blocks[block.block as usize];
                    assert_eq!(known.generation, block.generation);
                    known.pins = known.pins.checked_sub(pins).expect("more pins came back than were given");
                }
                None
            }
            Question::ReleaseLease(release) => {
                self.leases.remove(&release.lease_id);
                None
            }
            Question::RegisterWorker(_) => Some(Answer::Worker(v1::WorkerReply {})),
            Question::Ping(_) => Some(Answer::Pong(v1::Pong {})),
            other => Some(refused(Refusal::Invalid, &format!("{other:?}"))),
        }
    }

    fn open(&mut self, session: u64, open: v1::OpenPool) -> Answer {
        if self.hold.refuse_pool {
            return refused(Refusal::Exhausted, "no memory");
        }
        self.hold.forget_pool = false;
        let layout = PoolLayout { block_bytes: open.block_bytes as usize, block_count: open.block_count };
        self.blocks = vec![Block::default(); open.block_count as usize];
        let uuid = match open.adoption {
            None => {
                let side = self.side[&session].clone();
                let memory = match open.device.starts_with("GPU-") {
                    true => on_gpu(layout),
                    false => PoolMemory::create([5; 16], layout).unwrap(),
                };
                if let Some((descriptor, _)) = memory.device() {
                    let packet = SideMessage::DeviceMemory { uuid: [5; 16] }.encode();
                    side.send(&packet, Some(descriptor)).unwrap();
                }
                let memory = Arc::new(memory);
                let packet = SideMessage::PoolMemory { uuid: [5; 16] }.encode();
                side.send(&packet, Some(memory.fd())).unwrap();
                self.memory = Some(memory);
                vec![5; 16]
            }
            Some(adoption) => {
                let memory = self.arrived.remove(&adoption.pool_uuid).unwrap();
                assert_eq!((memory.layout(), memory.epoch()), (layout, adoption.epoch));
                self.memory = Some(Arc::new(memory));
                for entry in &adoption.entries {
                    let block = entry.block.unwrap();
                    let (generation, pins) = (block.generation, u32::from(entry.held));
                    self.blocks[block.block as usize] =
                        Block { generation, pins, key: Some(entry.key.clone()) };
                }
                for block in &adoption.held {
                    let generation = block.generation;
                    self.blocks[block.block as usize] = Block { generation, pins: 1, key: None };
                }
                self.adoptions.push(adoption.clone());
                adoption.pool_uuid
            }
        };
        Answer::Pool(v1::PoolReply {
            pool_id: 1,
            pool_uuid: uuid,
            epoch: self.memory.as_ref().unwrap().epoch(),
            block_count: layout.block_count,
            stride: layout.stride() as u64,
            offset: self.memory.as_ref().unwrap().blocks_offset() as u64,
            ..Default::default()
        })
    }

    fn grant(&mut self, count: u32) -> Answer {
        let mut blocks = Vec::new();
        for (number, block) in (0u32..).zip(&mut self.blocks) {
            if block.pins == 0 && blocks.len() < count as usize {
                *block = Block { generation: block.generation + 1, pins: 1, key: None };
                blocks.push(v1::BlockRef { block: number, generation: block.generation });
            }
        }
        Answer::Grants(v1::Grants { pool_id: 1, blocks })
    }

    fn find(&mut self, request: &v1::Match) -> Answer {
        let mut reply = v1::MatchReply::default();
        let mut keys = request.keys.chunks(16).peekable();
        while let Some(key) = keys.peek() {
            let Some((number, block)) =
                (0u32..).zip(&mut self.blocks).find(|(_, block)| block.key.as_deref() == Some(*key))
            else {
                break;
            };
            block.pins += 1;
            reply.device.push(v1::BlockRef { block: number, generation: block.generation });
            keys.next();
        }
        let mut host: Vec<Vec<u8>> = Vec::new();
        while let Some(key) = keys.next_if(|key| self.host.contains(*key)) {
            host.push(key.to_vec());
        }
        reply.disk_blocks =
            keys.take_while(|key| self.disk_has_all || self.disk.contains(*key)).count() as u32;
        if !host.is_empty() {
            self.next_lease += 1;
            (reply.host_blocks, reply.lease_id, reply.lease_ms) = (host.len() as u32, self.next_lease, 1000);
            self.leases.insert(self.next_lease, host);
        }
        Answer::Match(reply)
    }

    fn onboard(&mut self, request: &v1::Onboard) -> Answer {
        let Some(keys) = self.leases.remove(&request.lease_id) else {
            return refused(Refusal::Unknown, "no such lease");
        };
        let memory = self.memory.clone().unwrap();
        for (target, key) in request.targets.iter().zip(keys) {
            let block = &mut self.blocks[target.block as usize];
            assert_eq!((block.generation, block.pins), (target.generation, 1));
            memory.memory().write(memory.layout().offset(target.block), &[key[0]; 64]);
            block.key = Some(key);
        }
        let blocks_done = request.targets.len() as u32;
        Answer::TransferDone(v1::TransferDone { blocks_done, bytes: 64, ..Default::default() })
    }

    fn prefetch(&mut self, request: &v1::Prefetch) -> Answer {
        let keys = || request.keys.chunks(16).map(<[u8]>::to_vec);
        let mut reply = v1::PrefetchReply::default();
        if request.wait {
            self.host.extend(keys().filter(|key| self.disk.contains(key)));
        } else {
            reply.promoting_blocks =
                keys().skip_while(|key| self.host.contains(key)).count().try_into().unwrap();
        }
        reply.host_blocks = keys().take_while(|key| self.host.contains(key)).count().try_into().unwrap();
        Answer::Prefetch(reply)
    }

    pub fn forget_leases(&mut self) {
        self.leases.clear();
    }

    pub fn leases(&self) -> usize {
        self.leases.len()
    }
}

fn refused(refusal: Refusal, detail: &str) -> Answer {
    Answer::Refused(v1::Refused { refusal: refusal.into(), detail: detail.into() })
}
