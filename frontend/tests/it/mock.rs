//! A worker and a daemon that do what the test says.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll};

use kvbm_frontend::{Endpoint, Model};
use kvbm_proto::v1::generate_event::Body;
use kvbm_proto::v1::registry_server::{Registry, RegistryServer};
use kvbm_proto::v1::worker_server::{Worker, WorkerServer};
use kvbm_proto::v1::*;
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream, WatchStream};
use tokio_stream::{Stream, StreamExt};
use tonic::transport::ServerTlsConfig;
use tonic::{Request, Response, Status};

pub fn model_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny")
}

pub fn tiny() -> &'static Arc<Model> {
    static TINY: OnceLock<Arc<Model>> = OnceLock::new();
    TINY.get_or_init(|| Arc::new(Model::load(&model_path()).unwrap()))
}

/// Tokens of a text, without the one that begins a sequence.
pub fn tokens(text: &str) -> Vec<u32> {
    tiny().encode_prompt(text).unwrap().split_off(1)
}

/// What a worker does with a request.
#[derive(Clone)]
pub enum Script {
    /// Started, one event per list of tokens, Finished.
    Say(Vec<Vec<u32>>, FinishReason),
    /// Started and the tokens, and then nothing until the stream is dropped.
    Hang(Vec<u32>),
    /// Started and the tokens, and then this status.
    Fail(Vec<u32>, Status),
    /// Answers the call itself with this status.
    Refuse(Status),
}

/// Each token in an event of its own.
pub fn say(text: &str) -> Script {
    let events = tokens(text).into_iter().map(|token| vec![token]).collect();
    Script::Say(events, FinishReason::Length)
}

pub struct MockWorker {
    runtime: Option<Runtime>,
    pub endpoint: Endpoint,
    state: Arc<State>,
}

struct State {
    name: String,
    model: String,
    model_path: PathBuf,
    script: Mutex<Script>,
    requests: Mutex<Vec<GenerateRequest>>,
    cancelled: watch::Sender<usize>,
}

impl State {
    fn new(name: &str, model: &str, model_path: &Path, script: Script) -> Self {
        Self {
            name: name.to_owned(),
            model: model.to_owned(),
            model_path: model_path.to_owned(),
            script: Mutex::new(script),
            requests: Mutex::default(),
            cancelled: watch::Sender::default(),
        }
    }
}

impl MockWorker {
    pub fn start(folder: &Path, name: &str, model: &str, script: Script) -> Self {
        Self::start_with(folder, name, model, &model_path(), script)
    }

    pub fn start_with(folder: &Path, name: &str, model: &str, model_path: &Path, script: Script) -> Self {
        let path = folder.join(format!("{name}.sock"));
        let _ = std::fs::remove_file(&path);
        let state = Arc::new(State::new(name, model, model_path, script));
        // Its own runtime, so that it can be killed with all its connections.
        let runtime = runtime();
        let listener = runtime.block_on_here(|| UnixListener::bind(&path).unwrap());
        let service = WorkerServer::new(Served(state.clone()));
        let incoming = UnixListenerStream::new(listener);
        runtime.spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
        Self { runtime: Some(runtime), endpoint: Endpoint::Unix(path), state }
    }

    /// One of the tiny model that listens on a port of this machine.
    pub fn start_tcp(name: &str, script: Script) -> Self {
        let state = Arc::new(State::new(name, "tiny", &model_path(), script));
        let runtime = runtime();
        let listener = runtime.block_on_here(listen);
        let endpoint = Endpoint::Tcp(listener.local_addr().unwrap().to_string());
        let service = WorkerServer::new(Served(state.clone()));
        let incoming = TcpListenerStream::new(listener);
        runtime.spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
        Self { runtime: Some(runtime), endpoint, state }
    }

    pub fn set(&self, script: Script) {
        *self.state.script.lock().unwrap() = script;
    }

    pub fn requests(&self) -> Vec<GenerateRequest> {
        self.state.requests.lock().unwrap().clone()
    }

    /// Returns when so many streams were dropped before their end.
    pub async fn cancelled(&self, count: usize) {
        self.state.cancelled.subscribe().wait_for(|cancelled| *cancelled >= count).await.unwrap();
    }

    /// As `entry`, with a pool of this number.
    pub fn entry_with_pool(&self, pool_id: u32) -> WorkerEntry {
        let entry = self.entry();
        let worker = entry.worker.map(|worker| RegisterWorker { pool_id, ..worker });
        WorkerEntry { worker, ..entry }
    }

    pub fn entry(&self) -> WorkerEntry {
        let worker = RegisterWorker {
            worker_id: self.state.name.clone(),
            endpoint: self.endpoint.to_string(),
            model: self.state.model.clone(),
            model_path: self.state.model_path.display().to_string(),
            role: "both".to_owned(),
            tokens_per_block: 32,
            context_length: 4096,
            pool_id: 1,
            state: "ready".to_owned(),
            ..RegisterWorker::default()
        };
        WorkerEntry { worker: Some(worker), pid: 1, session_id: 1, base_namespace: vec![7; 32] }
    }
}

impl Drop for MockWorker {
    fn drop(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

/// On a free port; the caller is inside a runtime.
fn listen() -> TcpListener {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    TcpListener::from_std(listener).unwrap()
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

trait BlockOnHere {
    /// Runs with the runtime entered, also from within another runtime.
    fn block_on_here<T>(&self, run: impl FnOnce() -> T) -> T;
}

impl BlockOnHere for Runtime {
    fn block_on_here<T>(&self, run: impl FnOnce() -> T) -> T {
        let _entered = self.enter();
        run()
    }
}

struct Served(Arc<State>);

#[tonic::async_trait]
impl Worker for Served {
    type GenerateStream = Scripted;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Scripted>, Status> {
        self.0.requests.lock().unwrap().push(request.into_inner());
        let script = self.0.script.lock().unwrap().clone();
        let mut events = VecDeque::from([Ok(event(Body::Started(Started {
            device_tokens: 96,
            host_tokens: 64,
            disk_tokens: 32,
            onboard_us: 7000,
        })))]);
        let mut push = |ids: Vec<u32>| {
            events.push_back(Ok(event(Body::Tokens(Tokens { ids, ..Tokens::default() }))));
        };
        let mut hangs = false;
        match script {
            Script::Say(lists, reason) => {
                let completion_tokens = lists.iter().map(Vec::len).sum::<usize>() as u32;
                lists.into_iter().for_each(push);
                let finished = Finished { reason: reason.into(), prompt_tokens: 0, completion_tokens };
                events.push_back(Ok(event(Body::Finished(finished))));
            }
            Script::Hang(ids) => {
                hangs = true;
                if !ids.is_empty() {
                    push(ids);
                }
            }
            Script::Fail(ids, status) => {
                if !ids.is_empty() {
                    push(ids);
                }
                events.push_back(Err(status));
            }
            Script::Refuse(status) => return Err(status),
        }
        Ok(Response::new(Scripted { events, hangs, ended: false, state: self.0.clone() }))
    }

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeReply>, Status> {
        Ok(Response::new(DescribeReply {
            worker_id: self.0.name.clone(),
            model: self.0.model.clone(),
            model_path: self.0.model_path.display().to_string(),
            context_length: 4096,
            tokens_per_block: 32,
            vocab_size: 4096,
            eos_token_ids: vec![1],
            role: "both".to_owned(),
            state: "ready".to_owned(),
            pid: 1,
            base_namespace: vec![7; 32],
        }))
    }
}

fn event(body: Body) -> GenerateEvent {
    GenerateEvent { body: Some(body) }
}

pub struct Scripted {
    events: VecDeque<Result<GenerateEvent, Status>>,
    hangs: bool,
    ended: bool,
    state: Arc<State>,
}

impl Stream for Scripted {
    type Item = Result<GenerateEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.events.pop_front() {
            Some(event) => {
                self.ended = self.events.is_empty() && !self.hangs;
                Poll::Ready(Some(event))
            }
            None if self.hangs => Poll::Pending,
            None => Poll::Ready(None),
        }
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        if !self.ended {
            self.state.cancelled.send_modify(|count| *count += 1);
        }
    }
}

/// A daemon that knows workers, and what the test says of blocks.
pub struct MockDaemon {
    runtime: Option<Runtime>,
    list: watch::Sender<WorkerList>,
    pub blocks: Blocks,
}

/// What a daemon says of blocks, and what it was asked.
#[derive(Clone, Default)]
pub struct Blocks(Arc<BlocksState>);

#[derive(Default)]
struct BlocksState {
    snapshot: Mutex<SnapshotPart>,
    events: watch::Sender<Vec<Event>>,
    prefetched: Mutex<Vec<PrefetchKeysRequest>>,
}

impl Blocks {
    /// What snapshots say from now on.
    pub fn set_snapshot(&self, sequence: u64, stored: Vec<Event>) {
        *self.0.snapshot.lock().unwrap() =
            SnapshotPart { sequence, stored, last: true, instance: String::new() };
    }

    /// Tells everyone who watches, whatever he has heard before.
    pub fn tell(&self, events: Vec<Event>) {
        self.0.events.send_replace(events);
    }

    pub fn prefetched(&self) -> Vec<PrefetchKeysRequest> {
        self.0.prefetched.lock().unwrap().clone()
    }
}

impl MockDaemon {
    pub fn start(socket: &Path, workers: Vec<WorkerEntry>) -> Self {
        let _ = std::fs::remove_file(socket);
        let list = watch::Sender::new(WorkerList { workers });
        let runtime = runtime();
        let listener = runtime.block_on_here(|| UnixListener::bind(socket).unwrap());
        let blocks = Blocks::default();
        let service = RegistryServer::new(Registered(list.clone(), blocks.clone()));
        let incoming = UnixListenerStream::new(listener);
        runtime.spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
        Self { runtime: Some(runtime), list, blocks }
    }

    /// One over TCP with TLS, for requests with this header only. Also returns its port, and a count of the others.
    pub fn start_tls(
        workers: Vec<WorkerEntry>,
        tls: ServerTlsConfig,
        authorization: &'static str,
    ) -> (Self, u16, watch::Receiver<usize>) {
        let (list, refused) = (watch::Sender::new(WorkerList { workers }), watch::Sender::new(0));
        let (runtime, refusals) = (runtime(), refused.subscribe());
        let listener = runtime.block_on_here(listen);
        let port = listener.local_addr().unwrap().port();
        let guard = move |request: Request<()>| {
            if request.metadata().get("authorization").is_some_and(|header| header == authorization) {
                return Ok(request);
            }
            refused.send_modify(|count| *count += 1);
            Err(Status::unauthenticated("no"))
        };
        let blocks = Blocks::default();
        let service = RegistryServer::with_interceptor(Registered(list.clone(), blocks.clone()), guard);
        let server = tonic::transport::Server::builder().tls_config(tls).unwrap().add_service(service);
        runtime.spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        (Self { runtime: Some(runtime), list, blocks }, port, refusals)
    }

    pub fn set(&self, workers: Vec<WorkerEntry>) {
        self.list.send_replace(WorkerList { workers });
    }
}

impl Drop for MockDaemon {
    fn drop(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

struct Registered(watch::Sender<WorkerList>, Blocks);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Registry for Registered {
    type WatchWorkersStream = Answers<WorkerList>;
    type WatchEventsStream = Answers<EventBatch>;
    type SnapshotStream = Answers<SnapshotPart>;

    async fn watch_workers(
        &self,
        _: Request<WatchWorkersRequest>,
    ) -> Result<Response<Self::WatchWorkersStream>, Status> {
        Ok(Response::new(Box::pin(WatchStream::new(self.0.subscribe()).map(Ok))))
    }

    async fn watch_events(
        &self,
        _: Request<WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let told = WatchStream::from_changes(self.1.0.events.subscribe());
        Ok(Response::new(Box::pin(told.map(|events| Ok(EventBatch { events, last_sequence: 0 })))))
    }

    async fn snapshot(&self, _: Request<SnapshotRequest>) -> Result<Response<Self::SnapshotStream>, Status> {
        let part = SnapshotPart { last: true, ..self.1.0.snapshot.lock().unwrap().clone() };
        Ok(Response::new(Box::pin(tokio_stream::once(Ok(part)))))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn prefetch_keys(
        &self,
        request: Request<PrefetchKeysRequest>,
    ) -> Result<Response<PrefetchReply>, Status> {
        self.1.0.prefetched.lock().unwrap().push(request.into_inner());
        Ok(Response::new(PrefetchReply::default()))
    }

    async fn hand_over(&self, _: Request<HandOverRequest>) -> Result<Response<HandOverReply>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn end_hand_over(
        &self,
        _: Request<EndHandOverRequest>,
    ) -> Result<Response<EndHandOverReply>, Status> {
        Err(Status::unimplemented("not scripted"))
    }
}
